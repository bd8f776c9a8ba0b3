"""`run`, `stage`, `why` and `report`: building a preset or one node of it, and what came of it."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.errors import ConfigError, HeadwaterError

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NODE.FIELD=VALUE", help="A setting laid over the preset; the value is YAML."
    ),
]
PresetName = Annotated[str, typer.Option("--preset", help="Name of a preset, or the path of a YAML file.")]
Force = Annotated[bool, typer.Option("--force", help="Build anew what is in the store, as a new attempt.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Build anew what other code made.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(run)
    app.command()(stage)
    app.command()(why)
    app.command()(report)


def run(
    context: typer.Context,
    preset: PresetName = "demo",
    name: Annotated[str, typer.Option("--run", help="Name of the run (default: the preset's).")] = "",
    start: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="NODE", help="Build from here on; before it, take what is."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--to", metavar="NODE", help="Stop after this node.")
    ] = None,
    sets: Sets = None,
    force: Force = False,
    refresh: Refresh = False,
    parallel: Annotated[int, typer.Option(min=0, help="Nodes at once (default: as the preset says).")] = 0,
    prefect: Annotated[bool, typer.Option(help="Record the run in Prefect.")] = True,
    openlineage: Annotated[
        str, typer.Option(metavar="TARGET", help="Send OpenLineage events to this file or HTTP address.")
    ] = "",
    fault: Annotated[list[str] | None, typer.Option(metavar="NODE=POINT[:N]", hidden=True)] = None,
) -> None:
    """Run a preset: reuse what is in the store, build the rest, and report."""
    from flows.command_run import Request, perform
    from flows.runner import Options

    options = Options(
        start=tuple(start or ()),
        stop=tuple(stop or ()),
        force=force,
        refresh=refresh,
        parallel=parallel,
        faults=dict(_fault(one) for one in fault or ()),
    )
    home = str((context.parent and context.parent.params.get("home")) or "")
    request = Request(preset, tuple(sets or ()), name, options, prefect and not fault, openlineage, home)
    raise typer.Exit(perform(request))


def stage(
    name: Annotated[str, typer.Argument(metavar="NODE", help="A node of the run, or the name of a stage.")],
    run: Annotated[str, typer.Option(help="Take settings and inputs from this run.")] = "",
    sets: Sets = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="ROLE=REF", help="An input by reference; again for more in a role."),
    ] = None,
    force: Force = False,
    refresh: Refresh = False,
) -> None:
    """Build one node alone; its inputs come from a run (its newest attempts) or by reference.

    The result becomes the newest attempt of that node in the run: RUN/NODE then means it. Running the preset
    again points RUN/NODE back.
    """
    from flows.command_run import perform_one
    from flows.runner import Options

    refs: dict[str, list[str]] = {}
    for text in inputs or ():
        role, equals, ref = text.partition("=")
        if not (role and equals and ref):
            raise ConfigError(f"--input {text}: expected ROLE=REF, for example --input checkpoint=demo/sft")
        refs.setdefault(role, []).append(ref)
    raise typer.Exit(perform_one(name, run, tuple(sets or ()), refs, Options(force=force, refresh=refresh)))


def why(
    name: Annotated[str, typer.Argument(metavar="NODE")],
    preset: PresetName = "demo",
    run: Annotated[
        str, typer.Option(help="Take settings and inputs from this run, as `stage` does, not a preset.")
    ] = "",
    sets: Sets = None,
) -> None:
    """Say whether a node of a preset or of a run would be built, and why."""
    from flows.preset import load
    from flows.runner import explain
    from flows.single import from_run
    from infra.store import open_store

    store = open_store(write=False)
    asked = from_run(store, run, name, sets or []) if run else load(preset, sets or [])
    for line in explain(store, asked, name):
        print(line)


def report(
    name: Annotated[str, typer.Argument(metavar="RUN", help="The run to report on.")] = "demo",
    page: Annotated[bool, typer.Option("--page", help="Only write report.html and print its path.")] = False,
) -> None:
    """Report on a run as the store has it now."""
    from flows.report import gather
    from flows.report_page import write
    from flows.terminal import print_report
    from infra.store import open_store

    made = write(gather(open_store(), name))
    if page and made.unwritten:
        raise HeadwaterError(made.unwritten)
    if page:
        print(made.page)
    else:
        print_report(made)


def _fault(text: str) -> tuple[str, str]:
    node, equals, point = text.partition("=")
    if not equals:
        raise ConfigError(f"--fault {text}: expected NODE=POINT[:N]")
    return node, point
