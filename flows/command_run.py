"""What `headwater run` and `headwater stage` do, between the options given and the report printed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import prefect_home, registry, server, single
from flows.execute import execute
from flows.finish import finish
from flows.preset import Preset, load
from flows.report import Report
from flows.report_page import duration
from flows.runner import Options, Pipeline, Result
from flows.terminal import Terminal, print_report
from infra import diff, provenance
from infra.errors import ConfigError, HeadwaterError
from infra.store import Store, open_store

# Exit codes beside 0, 1 (error) and 130 (interrupted).
NOT_PROMOTED = 3


@dataclass(frozen=True)
class Request:
    """One `headwater run`."""

    preset: str
    sets: tuple[str, ...] = ()
    run: str = ""
    options: Options = field(default_factory=Options)
    prefect: bool = True
    openlineage: str = ""
    # As given with --home, "" when it was left out.
    home: str = ""

    @property
    def source(self) -> str:
        """The preset as it will be found again from another folder."""
        path = Path(self.preset)
        return str(path.absolute()) if path.suffix in (".yaml", ".yml") else self.preset

    def command(self) -> str:
        """This request as one types it."""
        options = self.options
        words = ["headwater"] + (["--home", self.home] if self.home else [])
        words += ["run", "--preset", self.preset] + (["--run", self.run] if self.run else [])
        listed = {"--from": options.start, "--to": options.stop, "--set": self.sets}
        words += [word for option, given in listed.items() for one in given for word in (option, one)]
        words += [f"--{name}" for name in ("force", "refresh") if getattr(options, name)]
        words += ["--parallel", str(options.parallel)] if options.parallel else []
        words += [] if self.prefect else ["--no-prefect"]
        words += ["--openlineage", self.openlineage] if self.openlineage else []
        return shlex.join(words)


def perform(request: Request) -> int:
    """Run a preset and print its report; returns the exit code."""
    store = open_store()
    preset = load(request.source, request.sets)
    if request.openlineage:
        provenance.check_target(request.openlineage)
    with Terminal() as terminal:
        terminal.widen(list(preset.nodes))
        try:
            result, made = _run(store, preset, request, terminal)
        except KeyboardInterrupt:
            terminal.say("stopped; what was under way is kept, and the same command resumes it", "yellow")
            return 130
        if request.openlineage:
            _emit(store, result, request.openlineage, terminal)
    print_report(made)
    if not result.ok:
        _say_how_to_go_on(result, request, terminal)
        return 1
    return NOT_PROMOTED if made.promotion.startswith("not ") else 0


def _emit(store: Store, result: Result, target: str, terminal: Terminal) -> None:
    """Send an event for each node that was built; what cannot be sent costs a warning, not the run."""
    try:
        for one in result.outcomes.values():
            if one.status in ("built", "resumed") and one.artifact:
                inputs = [store.resolve(pin.ref) for pin in one.artifact.record.inputs]
                event = provenance.completed(one.artifact, inputs, f"{result.run}.{one.node}")
                provenance.emit(event, target)
    except HeadwaterError as error:
        # The next one would wait for the same target just as long.
        terminal.say(f"{error}\nno further OpenLineage events are sent; the run is as it is", "yellow")


def _run(store: Store, preset: Preset, request: Request, terminal: Terminal) -> tuple[Result, Report]:
    # First without a word: when nothing is left to build, neither Prefect nor a worker is needed at all.
    seen: list[tuple[str, Mapping[str, Any]]] = []
    look = Pipeline(
        store, preset, request.run, request.options, lambda node, event: seen.append((node, event))
    )
    left = look.resolve()
    if not left:
        # Its warnings would be said again by a run that builds; here nobody else says them.
        for node, event in seen:
            if event["event"] == "log":
                terminal.listen(node, event)
        result = look.result()
        return result, finish(store, result)
    terminal.say(f"{len(left)} of {len(preset.nodes)} nodes to build in {store.home}")
    if request.prefect:
        recorded = _recorded(store, request, terminal)
        if recorded is not None:
            return recorded
    pipeline = Pipeline(store, preset, request.run, request.options, terminal.listen)
    result = asyncio.run(pipeline.execute())
    return result, finish(store, result)


def _recorded(store: Store, request: Request, terminal: Terminal) -> tuple[Result, Report] | None:
    """Run inside Prefect flows; None when Prefect cannot, for the run then goes on without."""
    with contextlib.ExitStack() as stack:
        # An address that the user has set for Prefect is meant; else the server of `headwater up`; else our
        # own.
        url = os.environ.get("PREFECT_API_URL", "") or server.running(store.home)
        lasting = bool(url)
        try:
            if not url:
                terminal.say("starting a Prefect server for this run (--no-prefect does without)")
                url = stack.enter_context(server.serve(store.home, services=False)).api_url
        except HeadwaterError as error:
            terminal.say(f"{error}\nthe run goes on without Prefect", "yellow")
            return None
        terminal.say(f"recording in Prefect at {url}")
        prefect_home.enter(store.home, url, lasting, console=False)
        from flows import pipeline

        kept = pipeline.Kept()
        try:
            options = request.options
            asyncio.run(
                pipeline.pipeline_flow(terminal.listen, kept)(
                    preset=request.source,
                    run=request.run,
                    settings=list(request.sets),
                    from_nodes=list(options.start),
                    to_nodes=list(options.stop),
                    force=options.force,
                    refresh=options.refresh,
                    parallel=options.parallel,
                )
            )
        except pipeline.StageFailed:
            pass  # the result says it
        except HeadwaterError:
            raise
        except Exception as error:  # Prefect's own trouble: the work that is done is in the store
            terminal.say(f"Prefect failed ({type(error).__name__}: {error}); going on without it", "yellow")
        finally:
            pipeline.flush()
        # What failed after the builds is no reason to build again.
        return (kept.result, kept.report or finish(store, kept.result)) if kept.result else None


def _say_how_to_go_on(result: Result, request: Request, terminal: Terminal) -> None:
    terminal.tell(result.failed)
    # What was built is found again, so nothing is gained by starting from the node that failed; and what
    # comes before it may not be in the store yet.
    terminal.say(f"when it is mended: {request.command()}")


def perform_one(
    name: str, run: str, sets: Sequence[str], refs: Mapping[str, Sequence[str]], options: Options
) -> int:
    """Build one node, say what changed against the one before, and return the exit code."""
    store = open_store()
    if run:
        preset = single.from_run(store, run, name, sets, refs)
    else:
        stages = registry.stages()
        if name not in stages:
            raise ConfigError(f"{name} is no stage; give --run to build a node of a run")
        preset = single.from_stage(stages[name], sets, refs)
    (node,) = preset.nodes
    run = run or single.NO_RUN
    before = ((store.names.run(run) or {"nodes": {}})["nodes"].get(node) or {}).get("artifact", "")
    with Terminal() as terminal:
        terminal.widen([node])
        pipeline = Pipeline(store, preset, run, options, terminal.listen)
        try:
            result = asyncio.run(_one(store, pipeline, terminal))
        except KeyboardInterrupt:
            terminal.say("stopped; the same command resumes it", "yellow")
            return 130
        outcome = result.outcomes[node]
        if outcome.artifact is None:
            terminal.tell(result.failed)
            return 1
        terminal.say(
            f"{run}/{node} is {outcome.artifact.ref} ({outcome.status}, {duration(outcome.seconds)})"
        )
        if before and before != outcome.artifact.ref:
            earlier = store.resolve(before)
            for one in diff.diff(earlier.record, outcome.artifact.record):
                if one.kind == "identity":
                    terminal.say(f"  {one}")
            terminal.say(f"before: {before}    headwater diff {before} {outcome.artifact.ref}")
    return 0


async def _one(store: Store, pipeline: Pipeline, terminal: Terminal) -> Result:
    """In Prefect too, if `headwater up` runs for this home; a server for one stage alone would cost more."""
    url = server.running(store.home)
    if not url or not pipeline.resolve():
        return await pipeline.execute(lambda task: execute(store, task, terminal.listen))
    prefect_home.enter(store.home, url, lasting=True, console=False)
    from flows.pipeline import record_node

    return await pipeline.execute(lambda task: record_node(store, task, terminal.listen))
