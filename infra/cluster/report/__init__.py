"""The plan told: chapters of figures beside published ones, as text, as JSON and as one page."""
