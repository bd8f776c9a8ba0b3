"""Running a preset: what is in the store is taken from there, the rest is built in worker processes.

No Prefect here. The store alone says what must be built; this file only decides the order and the share of
the machine that each node gets. A node whose inputs exist can be planned, and a plan that hits costs
nothing, so the whole pipeline is walked first; builds follow, the node with the longest way still to go
first.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flows.execute import Listen, Outcome, Task, execute
from flows.preset import Node, Preset
from infra import build, hardware, mend
from infra.artifact import Artifact
from infra.config import ModelStageConfig
from infra.errors import ConfigError, CorruptArtifact, UnknownReference, nearest
from infra.store import Store

Build = Callable[[Task], Awaitable[Outcome]]


@dataclass(frozen=True)
class Options:
    """What part of a preset to run, and how."""

    # Build these nodes and what follows from them; what comes before is taken from the cache or the run.
    start: tuple[str, ...] = ()
    # Stop after these nodes.
    stop: tuple[str, ...] = ()
    force: bool = False
    refresh: bool = False
    # Nodes at once, 0 = as many as the preset or its shape allows.
    parallel: int = 0
    # node -> POINT[:N] at which its worker dies, for tests.
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a run ended, node by node, in the preset's order."""

    run: str
    preset: Preset
    outcomes: Mapping[str, Outcome]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every node that was asked for has its artifact."""
        return all(outcome.ok for outcome in self.outcomes.values())

    @property
    def failed(self) -> list[Outcome]:
        """The nodes that failed or were interrupted by themselves."""
        return [one for one in self.outcomes.values() if one.status in ("failed", "interrupted")]


class Pipeline:
    """One run of one preset in one store."""

    def __init__(
        self,
        store: Store,
        preset: Preset,
        run: str = "",
        options: Options | None = None,
        listen: Listen = print,
    ) -> None:
        """Raises ConfigError when --from or --to name no node, nothing is left between them, or what is left
        wants a cluster."""
        self.store = store
        self.preset = preset
        self.run = run or preset.name
        self.options = options or Options()
        self.listen = listen
        self.outcomes: dict[str, Outcome] = {}
        self.wanted = self._wanted()
        self._refuse_cluster()
        self.cores = hardware.available_cores()
        self.parallel = self.options.parallel or places(preset)
        self._began = time.monotonic()
        self._weights: dict[str, float] = {}
        self._why: dict[str, tuple[str, ...]] = {}
        self._described = False

    def resolve(self) -> list[str]:
        """Take from the store whatever is there; returns the nodes that are left to build.

        Raises ConfigError when a node before --from is neither in the cache nor in the run, CorruptArtifact
        when an artifact in place is not what was published.
        """
        if not self._described and self.preset.source:
            self._describe()
        for name in self.preset.nodes:
            if name in self.wanted and name not in self.outcomes:
                self._resolve(name)
        return [name for name in self.preset.nodes if name in self.wanted and name not in self.outcomes]

    async def execute(self, make: Build | None = None) -> Result:
        """Build what `resolve` left, through `make` (by default: in worker processes, nothing else).

        After a failure nothing new starts; what runs is let finish. When cancelled, what runs is ended first.
        """
        make = make or (lambda task: execute(self.store, task, self.listen))
        left = self.resolve()
        self._weights = self._remaining(left)
        running: dict[asyncio.Task[Outcome], str] = {}
        free = self.parallel
        costs: dict[str, int] = {}
        try:
            while left or running:
                if not self._stopped():
                    for name in self._ready(left):
                        costs[name] = self._cost(name)
                        if running and costs[name] > free:
                            break  # wait for its share rather than let a shorter node overtake it
                        left.remove(name)
                        free -= costs[name]
                        running[asyncio.create_task(self._make(make, name))] = name
                if not running:
                    break
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    name = running.pop(task)
                    free += costs[name]
                    self.outcomes[name] = task.result()
                if not self._stopped():
                    left = self.resolve()
                    left = [name for name in left if name not in running.values()]
        except BaseException:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            raise
        return self.result()

    def result(self) -> Result:
        """How the run stands; nodes that were never reached are skipped."""
        for name in self.preset.nodes:
            if name in self.wanted and name not in self.outcomes:
                self.outcomes[name] = Outcome(name, self.preset.nodes[name].stage.name, "skipped")
                self.listen(name, {"event": "skipped"})
        ordered = {name: self.outcomes[name] for name in self.preset.nodes if name in self.outcomes}
        return Result(self.run, self.preset, ordered, time.monotonic() - self._began)

    # What to do with a node

    def _describe(self) -> None:
        """Note in the run how it came about, before anything is built: a node of it can then be run again."""
        self._described = True
        nodes = self.preset.nodes
        self.store.names.describe_run(
            self.run,
            preset=self.preset.source,
            name=self.preset.name,
            description=self.preset.description,
            sets=list(self.preset.sets),
            order=list(nodes),
            figures={name: list(node.stage.figures) for name, node in nodes.items()},
            root=self.preset.promote.node if self.preset.promote else list(nodes)[-1],
        )

    def _wanted(self) -> set[str]:
        start, stop = (
            [self.preset.node(name).name for name in names]
            for names in (self.options.start, self.options.stop)
        )
        scope = self.preset.ancestors(stop) if stop else set(self.preset.nodes)
        wanted = scope & self.preset.descendants(start) if start else scope
        if not wanted:
            raise ConfigError(f"--to {', '.join(stop)} is not made from --from {', '.join(start)}")
        return wanted

    def _refuse_cluster(self) -> None:
        """A model that is laid out on many GPUs must not be tried on one, hours after its data were made."""
        gpus = self.preset.cluster.gpus
        models = [
            name
            for name, node in self.preset.nodes.items()
            if name in self.wanted and isinstance(node.config, ModelStageConfig)
        ]
        if gpus > 1 and models:
            raise ConfigError(
                f"cluster.gpus is {gpus}, and this version runs models on one: {', '.join(models)} cannot be "
                "built. Plan them with `headwater plan`, build them on this machine with "
                "--set cluster.gpus=1, or stop before them with --to"
            )

    def _resolve(self, name: str) -> None:
        node = self.preset.nodes[name]
        inputs = None if name in self._why else self._inputs(node)
        if inputs is None:
            return
        plan = build.plan(self.store, node.stage, node.config, inputs)
        if plan.problem and not self.options.force:
            info = {"preset": self.preset.source, "name": self.preset.name, "sets": self.preset.sets}
            command = mend.rebuild_command(self.store, self.run, info, name)
            raise CorruptArtifact(f"{name}: {plan.problem}\nrestore the file, or build it again: {command}")
        if plan.hit is None or self.options.force or (self.options.refresh and plan.drift):
            changed = f"code changed: {', '.join(plan.drift)}"
            self._why[name] = plan.why or (("forced",) if self.options.force else (changed,))
            return
        build.sweep(self.store, plan)
        self._cached(name, plan.hit, "cached")
        if plan.drift:
            changed = ", ".join(plan.drift)
            message = f"reused, though its code has changed since: {changed} (--refresh rebuilds)"
            self.listen(name, {"event": "log", "level": "warning", "message": message})

    def _cached(self, name: str, artifact: Artifact, status: str) -> None:
        seconds = float(artifact.record.timings.get("seconds", 0.0))
        stage = self.preset.nodes[name].stage.name
        self.outcomes[name] = Outcome(name, stage, status, artifact, seconds)
        details = {"seconds": round(seconds, 3), "error": ""}
        self.store.names.record_node(
            self.run, name, stage=stage, status="cached", artifact=artifact, **details
        )
        self.listen(name, {"event": "cached", "ref": artifact.ref})

    def _inputs(self, node: Node) -> dict[str, tuple[Artifact, ...]] | None:
        """The artifacts that a node reads, by role; None while one of them is still to be built."""
        inputs: dict[str, tuple[Artifact, ...]] = {}
        for role, names in node.inputs.items():
            found = [self._input(name, f"{node.name}.{role}") for name in names]
            known = [one for one in found if one is not None]
            if len(known) < len(found):
                return None
            inputs[role] = tuple(known)
        return inputs

    def _input(self, name: str, reader: str) -> Artifact | None:
        if name.startswith("@"):
            return self.store.own(name[1:])
        if name in self.wanted:
            outcome = self.outcomes.get(name)
            return outcome.artifact if outcome else None
        artifact = self._given(name)
        if artifact is None:
            raise ConfigError(
                f"{reader} reads {name}, which lies before --from, is not in the cache as this preset "
                f"describes it, and was never built in run {self.run}: run without --from, or from {name}"
            )
        return artifact

    def _given(self, name: str) -> Artifact | None:
        """A node before --from: from the cache if its whole past is there, else as the run last had it."""
        if name in self.outcomes:
            return self.outcomes[name].artifact
        node = self.preset.nodes[name]
        parents = {parent: self._given(parent) for parent in node.parents}
        if all(parents.values()):
            inputs = {
                role: tuple(self.store.own(one[1:]) if one[0] == "@" else parents[one] for one in names)
                for role, names in node.inputs.items()
            }
            hit = build.plan(self.store, node.stage, node.config, inputs).hit
            if hit is not None:
                self._cached(name, hit, "given")
                return hit
        try:
            artifact = self.store.resolve(f"{self.run}/{name}")
        except UnknownReference:
            return None
        message = (
            f"taken as run {self.run} has it ({artifact.ref}), which is not what this preset would build"
        )
        self.listen(name, {"event": "log", "level": "warning", "message": message})
        self._cached(name, artifact, "given")
        return artifact

    async def _make(self, make: Build, name: str) -> Outcome:
        node = self.preset.nodes[name]
        return await make(
            Task(
                node=name,
                stage=node.stage,
                config=node.config,
                inputs=self._inputs(node) or {},
                run=self.run,
                folders=self.preset.folders,
                threads=node.config.threads or max(1, self.cores // self.parallel),
                force=self.options.force,
                refresh=self.options.refresh,
                fault=self.options.faults.get(name, ""),
                why=self._why.get(name, ()),
            )
        )

    # When

    def _stopped(self) -> bool:
        return any(not outcome.ok for outcome in self.outcomes.values())

    def _ready(self, left: Iterable[str]) -> list[str]:
        """The nodes whose inputs exist, the one with the longest way to go first."""
        ready = [
            name
            for name in left
            if all(parent in self.outcomes or parent not in self.wanted for parent in self._parents(name))
        ]
        return sorted(ready, key=lambda name: -self._weights.get(name, 0.0))

    def _parents(self, name: str) -> tuple[str, ...]:
        return self.preset.nodes[name].parents

    def _cost(self, name: str) -> int:
        """How many of the `parallel` places a node takes: more than one if it asks for more threads."""
        share = max(1, self.cores // self.parallel)
        return min(self.parallel, math.ceil((self.preset.nodes[name].config.threads or share) / share))

    def _remaining(self, left: Iterable[str]) -> dict[str, float]:
        """Seconds from the start of each node to the end of the longest chain behind it, as last measured."""
        document = self.store.names.run(self.run) or {"nodes": {}}
        todo = set(left)
        remaining: dict[str, float] = {}
        for name in reversed(list(self.preset.nodes)):
            if name in todo:
                behind = [remaining[one] for one in remaining if name in self._parents(one)]
                details = document["nodes"].get(name, {}).get("details", {})
                remaining[name] = (float(details.get("seconds") or 0.0) or 1.0) + max(behind, default=0.0)
        return remaining


def figure(result: Result, node: str, metric: str) -> float:
    """A number from the record of a node's artifact; ConfigError when there is none."""
    outcome = result.outcomes.get(node)
    if outcome is None or outcome.artifact is None:
        raise ConfigError(f"{node} has no artifact in this run")
    value = outcome.artifact.metrics.get(metric)
    if not isinstance(value, int | float):
        names = [name for name, one in outcome.artifact.metrics.items() if isinstance(one, int | float)]
        raise ConfigError(f"{node} has no figure {metric!r}; {nearest(metric, names)}")
    return float(value)


def explain(store: Store, preset: Preset, name: str) -> list[str]:
    """Whether a node would be built, and why; if it must wait, for which nodes, and why those."""
    wanted = preset.node(name).name
    found: dict[str, Artifact] = {}
    lines = []
    for node in preset.nodes.values():
        if node.name not in preset.ancestors([wanted]):
            continue
        if not all(parent in found for parent in node.parents):
            waits = ", ".join(parent for parent in node.parents if parent not in found)
            lines.append(f"{node.name}: to be built after {waits}")
            continue
        inputs = {
            role: tuple(store.own(one[1:]) if one[0] == "@" else found[one] for one in names)
            for role, names in node.inputs.items()
        }
        plan = build.plan(store, node.stage, node.config, inputs)
        if plan.hit is None:
            lines += [f"{node.name}: {reason}" for reason in ((plan.problem,) if plan.problem else plan.why)]
            lines += [mend.advice(store, f"{plan.stage}@{plan.id}")] if plan.problem else []
        else:
            found[node.name] = plan.hit
            if node.name == wanted:
                lines.append(f"{node.name}: in the store as {plan.hit.ref}, nothing to build")
            if plan.drift:
                changed = ", ".join(plan.drift)
                lines.append(
                    f"{node.name}: code has changed since it was built: {changed} (--refresh rebuilds)"
                )
    return lines


def places(preset: Preset) -> int:
    """How many nodes run at once: what the preset says, else its width in the graph, up to the cores."""
    depth: dict[str, int] = {}
    for node in preset.nodes.values():
        depth[node.name] = 1 + max((depth[parent] for parent in node.parents), default=0)
    widest = max(list(depth.values()).count(level) for level in set(depth.values()))
    return preset.parallel or min(hardware.available_cores(), widest)
