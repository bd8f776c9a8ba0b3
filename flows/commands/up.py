"""`up`: Prefect's server, worker and deployments for this home."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(up)


def up(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port (default: 4200, or the next that is free).")
    ] = 0,
    presets: Annotated[
        list[str] | None, typer.Option("--preset", help="Presets to deploy (default: all that come along).")
    ] = None,
) -> None:
    """Start a Prefect server, a worker and every deployment, on loopback; Ctrl-C ends them."""
    from flows.preset import shipped
    from flows.up import up as serve
    from infra.store import open_store

    serve(open_store().home, port, presets or shipped(), lambda text: print(text, flush=True))
