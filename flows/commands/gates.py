"""`gates`: the claims of a preset, measured over several seeds."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(gates)


def gates(
    preset: Annotated[
        str, typer.Option("--preset", help="Name of a preset, or the path of a YAML file.")
    ] = "demo",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0 on.")] = 3,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NODE.FIELD=VALUE", help="A setting laid over the preset."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=0, help="Nodes at once (default: as the preset says).")] = 0,
) -> None:
    """Run what a preset's gates need once a seed, and print each claim with its figures.

    Exit code 1 if a claim fails for any seed. What the runs have in common with each other or with earlier
    runs is not built again.
    """
    import asyncio

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flows.gates import judge
    from flows.preset import load
    from flows.report_page import number
    from flows.runner import Options, Pipeline, figure
    from flows.terminal import Terminal
    from infra.store import open_store

    store = open_store()
    verdicts = []
    with Terminal() as terminal:
        for seed in range(seeds):
            loaded = load(preset, [*(sets or []), f"defaults.seed={seed}"])
            if not loaded.gates:
                raise ConfigError(f"preset {loaded.name} has no gates")
            needed = tuple({node: None for gate in loaded.gates for _, node, _ in gate.terms})
            terminal.widen(list(loaded.nodes))
            terminal.say(f"seed {seed}: {', '.join(needed)}")
            options = Options(stop=needed, parallel=parallel)
            pipeline = Pipeline(store, loaded, f"{loaded.name}-seed{seed}", options, terminal.listen)
            try:
                result = asyncio.run(pipeline.execute())
            except KeyboardInterrupt:
                terminal.say("stopped; the same command resumes it", "yellow")
                raise typer.Exit(130) from None
            if not result.ok:
                # What earlier seeds have shown is told all the same.
                terminal.tell(result.failed)
                break
            verdicts.append(
                [judge(gate, lambda node, name, r=result: figure(r, node, name)) for gate in loaded.gates]
            )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "claim", "asked", "mean", *(f"seed {seed}" for seed in range(len(verdicts)))):
        table.add_column(name)
    for row in zip(*verdicts, strict=True):
        values = [one.value for one in row if one.value is not None]
        mean = number(sum(values) / len(values)) if values else "none"
        mark = Text("holds", style="green") if all(one.holds for one in row) else Text("FAILS", style="red")
        cells = [Text(number(one.value) if one.value is not None else one.problem) for one in row]
        table.add_row(mark, Text(row[0].gate.name), Text(row[0].gate.bound), Text(mean), *cells)
    Console(highlight=False).print(table)
    if len(verdicts) < seeds or not all(one.holds for row in verdicts for one in row):
        raise typer.Exit(1)
