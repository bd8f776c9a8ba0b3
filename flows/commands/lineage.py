"""`lineage`: where an artifact came from, and what was made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from infra.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(lineage)


def lineage(
    ref: Annotated[str, typer.Argument(metavar="REF", help="run/node, a promoted name, stage@id or a path.")],
    downstream: Annotated[
        bool, typer.Option("--downstream", help="What was built from it, instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    html: Annotated[bool, typer.Option("--html", help="As one HTML page.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a mermaid diagram.")] = False,
    provenance: Annotated[
        bool, typer.Option("--provenance", help="As an in-toto statement with SLSA provenance.")
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Print the graph of records behind an artifact, back to the source documents."""
    from infra import lineage as graphs
    from infra.files import atomic_write_text
    from infra.lineage_page import to_html
    from infra.provenance import statement
    from infra.store import open_store

    if as_json + html + mermaid + provenance > 1:
        raise ConfigError("lineage: give one of --json, --html, --mermaid and --provenance")
    store = open_store(write=False)
    artifact = store.resolve(ref)
    store = store.around(artifact)
    graph = graphs.forward(store, artifact) if downstream else graphs.back(store, artifact)
    if as_json:
        text = json.dumps(graphs.to_json(graph), indent=2, ensure_ascii=False) + "\n"
    elif html:
        text = to_html(graph)
    elif mermaid:
        text = graphs.to_mermaid(graph)
    elif provenance:
        text = json.dumps(statement(store, artifact), indent=2, ensure_ascii=False) + "\n"
    else:
        text = graphs.to_text(graph)
    if output:
        atomic_write_text(output, text, points=None)
        print(output)
    else:
        print(text, end="")
