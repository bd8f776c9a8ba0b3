"""`serve`: a checkpoint behind OpenAI's HTTP interface."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.store import open_store


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(serve)


def serve(
    ref: Annotated[str, typer.Argument(metavar="REF", help="run/node, a promoted name, stage@id or a path.")],
    host: Annotated[str, typer.Option(help="Address to serve at. There is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers made at a time.")] = 128,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait for their turn.")] = 512,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens where a request gives no limit.")
    ] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request in bytes.")] = 4 << 20,
    invariant: Annotated[
        bool, typer.Option("--invariant", help="Answers do not depend, to the bit, on what else is asked.")
    ] = False,
    drafts: Annotated[int, typer.Option(min=0, help="Tokens that the model guesses ahead.")] = 0,
    read_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request to come in.")] = 30.0,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds for answers to end after Ctrl-C.")] = 30.0,
) -> None:
    """Serve a checkpoint through OpenAI's API (chat completions, completions) until Ctrl-C or SIGTERM."""
    import asyncio
    import socket
    from pathlib import Path

    from data.chat import EOS
    from flows.open_model import open_model
    from flows.serving.server import Server, bind, more_files
    from flows.serving.settings import Settings
    from infra.errors import HeadwaterError
    from model.engine.engine import Engine

    artifact = open_store().resolve(ref)
    # Before the model is loaded: a port that is taken should not cost the wait.
    bound = bind(host, port)
    more_files()
    with bound:
        model, tokenizer = open_model(artifact)
        try:
            engine = Engine(
                model,
                [EOS],
                max_rows=max_rows,
                token_bytes=tokenizer.token_bytes(),
                invariant=invariant,
                drafts=drafts,
            )
        except ValueError as error:
            raise HeadwaterError(str(error)) from error
        settings = Settings(max_rows, max_queue, max_tokens, max_body, read_timeout, drain=drain)
        # A path is nobody's business but this machine's.
        name = artifact.ref if Path(ref).exists() else ref

        def ready() -> None:
            address, taken = bound.getsockname()[:2]
            where = f"[{address}]" if bound.family == socket.AF_INET6 else address
            url = f"http://{where}:{taken}/v1"
            typer.echo(f"serving {name} at {url}, context {engine.context}; Ctrl-C ends it")

        async def run() -> None:
            await Server(engine, tokenizer, name, settings, (artifact.ref,)).run(bound, ready, signals=True)

        asyncio.run(run())
