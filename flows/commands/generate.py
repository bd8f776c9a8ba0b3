"""`generate` and `chat`: ask a checkpoint something."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.store import open_store

Ref = Annotated[str, typer.Argument(metavar="REF", help="run/node, a promoted name, stage@id or a path.")]
Think = Annotated[
    bool, typer.Option("--think", help="Put the system prompt that asks for reasoning in front.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(generate)
    app.command()(chat)


def generate(
    ref: Ref,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    think: Think = False,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
) -> None:
    """Print a checkpoint's answer to one prompt."""
    typer.echo(_Session(ref, think, temperature, max_tokens, seed).answer(prompt))


def chat(
    ref: Ref,
    think: Think = False,
    temperature: Temperature = 0.6,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
) -> None:
    """Ask a checkpoint questions in the terminal, one at a time; an empty line or Ctrl-D ends."""
    session = _Session(ref, think, temperature, max_tokens, seed)
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            return
        if not prompt:
            return
        typer.echo(session.answer(prompt))


class _Session:
    """A loaded model; each question draws from a seed of its own, so asking again gives another sample."""

    def __init__(self, ref: str, think: bool, temperature: float, max_tokens: int, seed: int) -> None:
        from data.chat import EOS
        from flows.open_model import open_model
        from model.engine.engine import Engine
        from model.engine.sampling import Sampling
        from post_training.tasks.problem import SYSTEM

        model, self.tokenizer = open_model(open_store().resolve(ref))
        self.engine = Engine(model, [EOS])
        self.sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
        self.system = SYSTEM if think else ""
        self.seed = seed

    def answer(self, prompt: str) -> str:
        """The response as text, its thought included."""
        from infra.errors import HeadwaterError
        from model.engine.engine import Request

        request = Request(tuple(self.tokenizer.prompt_ids(prompt, self.system)), self.seed)
        self.seed += 1
        try:
            [completion] = self.engine.generate([request], self.sampling)
        except ValueError as error:
            raise HeadwaterError(str(error)) from error
        shown = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
        return self.tokenizer.decode(shown, keep_specials=True)
