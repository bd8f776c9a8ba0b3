"""`generate` and `chat`: ask a checkpoint something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from infra.errors import HeadwaterError
from infra.store import open_store

if TYPE_CHECKING:
    from data.chat import ChatTokenizer
    from model.engine.engine import Engine

Ref = Annotated[str, typer.Argument(metavar="REF", help="run/node, a promoted name, stage@id or a path.")]
Think = Annotated[
    bool, typer.Option("--think", help="Put the system prompt that asks for reasoning in front.")
]
System = Annotated[str, typer.Option(help="System prompt.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Share of the likeliest tokens' mass to sample from.")]
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
    system: System = "",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
) -> None:
    """Print a checkpoint's answer to one prompt."""
    from model.engine.request import Request
    from model.engine.sampling import Sampling

    system = _system(think, system)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    engine, tokenizer = _open(ref)
    [completion] = engine.generate([Request(tuple(tokenizer.prompt_ids(prompt, system)), sampling)])
    shown = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
    typer.echo(tokenizer.decode(shown, keep_specials=True))


def chat(
    ref: Ref,
    think: Think = False,
    system: System = "",
    temperature: Temperature = 0.6,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
) -> None:
    """Talk with a checkpoint in the terminal; an empty line, Ctrl-D or /exit ends, Ctrl-C stops an answer.

    /reset begins a new conversation, /system TEXT sets the system prompt.
    """
    from flows.serving.talk import Talk
    from model.engine.sampling import Sampling

    system = _system(think, system)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    engine, tokenizer = _open(ref)
    Talk(engine, tokenizer, sampling, system).run()


def _system(think: bool, system: str) -> str:
    from post_training.tasks.problem import SYSTEM

    if think and system:
        raise HeadwaterError("--think is a system prompt too: leave out --system or --think")
    return SYSTEM if think else system


def _open(ref: str) -> tuple[Engine, ChatTokenizer]:
    """An engine for one answer at a time."""
    from data.chat import EOS
    from flows.open_model import open_model
    from model.engine.engine import Engine

    model, tokenizer = open_model(open_store().resolve(ref))
    return Engine(model, [EOS], max_rows=1), tokenizer
