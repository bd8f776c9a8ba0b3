"""`plan`: what a preset's training and serving will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.errors import ConfigError, HeadwaterError

if TYPE_CHECKING:
    from infra.cluster.pipeline.replay import Timeline


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(plan)


def plan(
    preset: Annotated[
        str, typer.Option("--preset", help="Name of a preset, or the path of a YAML file.")
    ] = "v3",
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NODE.FIELD=VALUE",
            help="A setting laid over the preset, such as cluster.pipeline=8 or pretrain.precision=bf16.",
        ),
    ] = None,
    machine: Annotated[
        str, typer.Option(help="Another machine than the preset's: its name, or a JSON file.")
    ] = "",
    gpus: Annotated[int, typer.Option(min=0, help="Other GPUs than the preset's.")] = 0,
    search: Annotated[
        bool, typer.Option("--search", help="The best layouts for these GPUs instead, with their reasons.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    html: Annotated[bool, typer.Option("--html", help="As one HTML page.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
    durations: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TRACE",
            help="A Chrome trace of a step, of a training run (a file a rank) or written by --trace: what "
            "its passes took is replayed instead of predicted.",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="A kernel trace of torch's profiler: how much of its communication was hidden.",
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the step's timeline here as a Chrome trace, for Perfetto.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the step's timeline here: .svg or .png.")
    ] = None,
) -> None:
    """Plan a run: does it fit, how long, how much, where does the time go.

    Needs no GPU and no store. Everything follows from the preset and a description of the hardware; published
    figures only stand beside.
    """
    from flows.planning import planned, searched
    from flows.preset import load
    from infra.cluster.report.layouts import layouts_chapter
    from infra.cluster.report.page import to_page
    from infra.cluster.report.tell import tell, to_json
    from infra.cluster.report.text import to_text
    from infra.cluster.training.stages import settled

    if as_json and html:
        raise ConfigError("plan: give one of --json and --html")
    if search and (durations or profile or trace or picture):
        raise ConfigError(
            "plan: --search plans no step: leave --durations, --profile, --trace and --picture out"
        )
    if picture and picture.suffix not in (".svg", ".png"):
        raise ConfigError(f"plan: --picture {picture}: name a .svg or a .png file")
    settings = list(sets or [])
    # A value is read as YAML, in which a path may be something else: JSON is YAML that says it is text.
    settings += [f"cluster.machine={json.dumps(machine)}"] if machine else []
    settings += [f"cluster.gpus={gpus}"] if gpus else []
    loaded = load(preset, settings)
    if search:
        shape, space, described = searched(loaded)
        title, layout = f"Layouts of {loaded.name}", None
        subtitle = f"{loaded.description} {space.gpus:,} x {described.name}."
        chapters = [layouts_chapter(shape, space, described)]
    else:
        times = None
        if durations:
            from infra.cluster.pipeline.chrome_trace import read_times

            times = read_times(durations)
        made = planned(loaded, times)
        if trace:
            from infra.cluster.pipeline.chrome_trace import write

            write(made.step.timeline, trace)
        if picture:
            _draw(made.step.timeline, picture)
        layout = settled(made.request.shape, made.step.layout)
        title, subtitle, described = made.request.title, made.request.subtitle, made.request.machine
        chapters = tell(made)
        if profile:
            from infra.cluster.report.profile import profile_chapter

            chapters.append(profile_chapter(profile))
    if as_json:
        text = to_json(described, chapters, layout)
    elif html:
        text = to_page(title, subtitle, chapters)
    else:
        text = to_text(f"{title}: {subtitle}", chapters)
    if output:
        _write(output, text)
        print(output)
    else:
        print(text, end="")


def _draw(timeline: Timeline, picture: Path) -> None:
    from infra.cluster.pipeline.timeline import png, svg

    if picture.suffix == ".svg":
        _write(picture, svg(timeline))
    else:
        png(timeline, picture)


def _write(path: Path, text: str) -> None:
    from infra.files import atomic_write_text

    try:
        atomic_write_text(path, text, points=None)
    except OSError as error:
        raise HeadwaterError(f"{path}: cannot be written: {error.strerror or error}") from None
