"""An OpenAI-compatible server over the engine, and what the terminal chat shares with it."""
