"""The Prefect side: one flow per stage, and the pipeline flow that calls them for what must be built.

Prefect shows, schedules and cancels; it decides nothing. What is built and what is reused comes from the
store (flows.runner), the work happens in worker processes (flows.execute), and when the server goes away in
the middle the run goes on without it. Subflows are called in this process and awaited side by side: a
submitted one would not be reached by a cancellation.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run

from flows import prefect_artifacts, single
from flows.execute import Listen, Outcome, Task, execute
from flows.finish import finish
from flows.preset import Preset, load
from flows.report import Report
from flows.runner import Options, Pipeline, Result
from infra.errors import BuildError, HeadwaterError
from infra.stage import Stage
from infra.store import Store, open_store

# A line of progress in Prefect's log at most this often, in seconds.
_EVERY = 15.0
# Parameters of every stage's flow, beside its config and its inputs.
_COMMON = ("config", "run", "node", "force", "refresh")


@dataclasses.dataclass
class Kept:
    """What a pipeline flow came to, as far as it came; a fault after the builds must not lose them."""

    result: Result | None = None
    report: Report | None = None


class StageFailed(HeadwaterError):
    """A stage did not come to its artifact; the message is the stage's own."""


def stage_flow(stage: Stage, folders: tuple[Path, ...] = ()) -> Flow[Any, Any]:
    """The flow of a stage: its form is the stage's config, and a reference for each input.

    An input left empty is taken from `run`. Raises ConfigError when a role has the name of another parameter.
    """

    async def body(**given: Any) -> dict[str, Any]:
        store = open_store()
        listen = logged(get_run_logger())
        refs = {role: _listed(given[role]) for role in stage.inputs}
        run = given["run"] or single.NO_RUN
        preset = _preset(store, stage, given, {role: names for role, names in refs.items() if names}, folders)
        pipeline = Pipeline(
            store, preset, run, Options(force=given["force"], refresh=given["refresh"]), listen
        )

        async def make(task: Task) -> Outcome:
            return await execute(store, dataclasses.replace(task, prefect=_identity()), listen)

        (outcome,) = (await pipeline.execute(make)).outcomes.values()
        return await _told(store, run, outcome)

    def name() -> str:
        return str(flow_run.parameters.get("node") or stage.name)

    return flow(name=stage.name, flow_run_name=name, description=stage.description)(_signed(body, stage))


def _preset(
    store: Store,
    stage: Stage,
    given: Mapping[str, Any],
    refs: Mapping[str, list[str]],
    folders: tuple[Path, ...],
) -> Preset:
    """A preset of this one node; inputs that the form left empty come from the run, if there is one."""
    name, run = given["node"] or stage.name, store.names.run(given["run"]) if given["run"] else None
    if run is None or "preset" not in run["info"]:
        return single.from_stage(stage, refs=refs, config=given["config"], name=name, folders=folders)
    known = single.from_run(store, given["run"], name, refs=refs)
    nodes = {key: dataclasses.replace(node, config=given["config"]) for key, node in known.nodes.items()}
    return dataclasses.replace(known, nodes=nodes)


def pipeline_flow(
    listen: Listen | None = None, kept: Kept | None = None, yielding: bool = False
) -> Flow[Any, Any]:
    """The pipeline flow. `listen` hears every event too; the result goes into `kept`. `yielding`: see
    `finish`.
    """

    def name() -> str:
        return str(flow_run.parameters.get("run") or Path(flow_run.parameters.get("preset", "demo")).stem)

    @flow(name="pipeline", flow_run_name=name, description="Reuse what is in the store, build the rest.")
    async def pipeline(
        preset: str = "demo",
        run: str = "",
        settings: list[str] = [],  # noqa: B006 - never changed; a form needs the plain default
        from_nodes: list[str] = [],  # noqa: B006
        to_nodes: list[str] = [],  # noqa: B006
        force: bool = False,
        refresh: bool = False,
        parallel: int = 0,
    ) -> dict[str, Any]:
        """Run a preset.

        Args:
            preset: Name of a preset, or the path of a YAML file
            run: Name of the run; empty: the preset's name
            settings: node.field=value, laid over the preset
            from_nodes: Build from these nodes on; what comes before is taken as it is
            to_nodes: Stop after these nodes
            force: Build anew what is in the store already
            refresh: Build anew what other code made
            parallel: Nodes at once; 0: as the preset says
        """
        store = open_store()
        options = Options(tuple(from_nodes), tuple(to_nodes), force, refresh, parallel)
        heard = both(logged(get_run_logger()), listen)
        pipe = Pipeline(store, load(preset, settings), run, options, heard)
        keep = kept or Kept()
        keep.result = result = await pipe.execute(lambda task: record_node(store, task, listen))
        keep.report = made = finish(store, result, yielding)
        await prefect_artifacts.publish_run(store, result, made.gates)
        if not result.ok:
            raise StageFailed("; ".join(f"{one.node}: {one.error}" for one in result.failed))
        return {name: one.artifact.ref for name, one in result.outcomes.items() if one.artifact}

    return pipeline


async def record_node(store: Store, task: Task, listen: Listen | None) -> Outcome:
    """Build a node inside a flow run of its own; without one if Prefect cannot make it."""
    if not await prefect_artifacts.reachable():
        return await execute(store, task, listen or (lambda node, event: None))
    found: list[Outcome] = []

    async def body(**given: Any) -> dict[str, Any]:
        heard = both(logged(get_run_logger()), listen)
        found.append(await execute(store, dataclasses.replace(task, prefect=_identity()), heard))
        return await _told(store, task.run, found[0])

    shown = {role: [one.ref for one in listed] for role, listed in task.inputs.items()}
    given: dict[str, Any] = {
        role: shown.get(role, []) if spec.many else (shown.get(role) or [""])[0]
        for role, spec in task.stage.inputs.items()
    }
    given |= {"config": task.config, "run": task.run, "node": task.node}
    given |= {"force": task.force, "refresh": task.refresh}
    made = flow(name=task.stage.name, flow_run_name=task.node)(_signed(body, task.stage))
    try:
        await made(**given)
    except Exception as error:  # the server may refuse or be gone at any moment
        if not isinstance(error, StageFailed):
            heard = listen or logged(logging.getLogger("headwater"))
            message = f"Prefect did not record {task.node} ({error}); the work goes on without it"
            heard(task.node, {"event": "log", "level": "warning", "message": message})
    return found[0] if found else await execute(store, task, listen or (lambda node, event: None))


async def _told(store: Store, run: str, outcome: Outcome) -> dict[str, Any]:
    """Publish what a node came to; a failed one fails its flow run."""
    if outcome.artifact is None:
        raise StageFailed(outcome.error)
    await prefect_artifacts.publish_node(store, run, outcome.node, outcome.artifact, outcome.status)
    return {"ref": outcome.artifact.ref, "status": outcome.status, "seconds": outcome.seconds}


def _signed(body: Any, stage: Stage) -> Any:
    """Give a flow function a stage's signature: Prefect makes its form from the stage's own types."""
    clash = set(_COMMON) & set(stage.inputs)
    if clash:
        raise BuildError(f"stage {stage.name}: an input must not be called {', '.join(sorted(clash))}")

    def parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
        place = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, place, default=default, annotation=kind)

    try:
        default = stage.config()
    except ValueError:  # a config with a field that has no default
        default = inspect.Parameter.empty
    parameters = [parameter("config", stage.config, default)]
    lines = ["config: Settings of the stage"]
    for role, spec in stage.inputs.items():
        parameters.append(parameter(role, list[str] if spec.many else str, [] if spec.many else ""))
        lines.append(
            f"{role}: {spec.description or role} (run/node, a name or stage@id; empty: from the run)"
        )
    parameters += [parameter("run", str, ""), parameter("node", str, "")]
    parameters += [parameter("force", bool, False), parameter("refresh", bool, False)]
    lines += [
        "run: Run to take inputs from and to record the result in",
        "node: Node of that run; empty: the stage",
    ]
    lines += ["force: Build anew even if it is in the store", "refresh: Build anew if the code has changed"]
    body.__signature__ = inspect.Signature(parameters)
    body.__name__ = body.__qualname__ = stage.name
    body.__doc__ = f"{stage.description}\n\nArgs:\n" + "".join(f"    {line}\n" for line in lines)
    return body


def _listed(value: str | Sequence[str]) -> list[str]:
    return [one for one in ([value] if isinstance(value, str) else value) if one]


def _identity() -> dict[str, str]:
    """The Prefect run that this is, for the record."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return {}
    run = {"flow_run_id": str(context.flow_run.id), "flow_run_name": str(context.flow_run.name)}
    # A server that lives for one run only has no address worth recording.
    pages = os.environ.get("PREFECT_UI_URL", "")
    return run | ({"url": f"{pages}/runs/flow-run/{context.flow_run.id}"} if pages else {})


def logged(logger: Any) -> Listen:
    """A listener that writes events to a logger; progress now and then only."""
    said: dict[str, float] = {}

    def listen(node: str, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "log":
            logger.log(logging.WARNING if event.get("level") == "warning" else logging.INFO, event["message"])
        elif kind == "progress":
            now = time.monotonic()
            if now - said.get(node, -_EVERY) >= _EVERY:
                said[node] = now
                figures = {name: value for name, value in event.items() if name != "event"}
                logger.info(
                    "%s %s", node, "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
                )
        elif kind in ("failed", "interrupted"):
            logger.error("%s %s: %s", node, kind, event["message"])
        else:
            logger.info("%s %s %s", node, kind, event.get("ref", event.get("status", "")))

    return listen


def both(first: Listen, second: Listen | None) -> Listen:
    """A listener that passes on to two."""
    if second is None:
        return first

    def listen(node: str, event: Mapping[str, Any]) -> None:
        first(node, event)
        second(node, event)

    return listen


def flush() -> None:
    """Send what is still in Prefect's queues, before the server that takes it ends."""
    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)
