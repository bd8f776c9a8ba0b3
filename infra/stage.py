"""What a stage is: a name, a typed configuration, the roles it reads, and a plain function.

A stage runs without Prefect and without a store: `run(config, context)` reads `context.inputs`, writes files
under `context.out`, and keeps what it needs to resume under `context.scratch`.

Everything under `out` is hashed. All of it is part of the artifact's digest and must be byte-deterministic
(no times, no temporary paths, sorted iteration), but for `out/logs/`, `out/plots/` and `out/*.html`, which
are listed apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.artifact import Artifact
from infra.config import StageConfig, canonical_json
from infra.errors import BuildError, HeadwaterError, nearest
from infra.faults import fault
from infra.files import atomic_write_json, sha256_bytes

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class InputSpec:
    """A role that a stage reads: which stages may fill it, and how many artifacts it takes."""

    stages: tuple[str, ...]
    many: bool = False
    optional: bool = False
    description: str = ""


@dataclass(frozen=True, order=True)
class SourceFile:
    """One external input as scanned: path or URL as the stage names it, size in bytes, SHA-256 of content.

    Use paths that mean the same on another machine (relative to the source's root): they are part of the
    fingerprint.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Stage:
    """A kind of work. `version` is raised by hand when the same configuration must give another result."""

    name: str
    version: int
    config: type[StageConfig]
    run: Callable[[Any, StageContext], None]
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)
    # For stages that read the outside world: the content-hashed list of what they are about to read.
    scan: Callable[[Any], list[SourceFile]] | None = None
    description: str = ""
    # The metrics worth a place in a run's table, up to four; without any, the first ones by name.
    figures: tuple[str, ...] = ()
    # Fields of the config that all nodes of this stage in one preset must agree on.
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise HeadwaterError(f"stage name {self.name!r}: use lower-case letters, digits and _")
        if not self.description:
            doc = (getattr(self.run, "__globals__", {}).get("__doc__") or self.run.__doc__ or "").strip()
            object.__setattr__(self, "description", doc.splitlines()[0].strip() if doc else "")


def sources_summary(files: Sequence[SourceFile]) -> dict[str, Any]:
    """`{digest, files, bytes}` of scanned sources, independent of the order they were found in."""
    rows = sorted([one.path, one.bytes, one.sha256] for one in files)
    return {
        "digest": sha256_bytes(canonical_json(rows)),
        "files": len(rows),
        "bytes": sum(row[1] for row in rows),
    }


def check_inputs(stage: Stage, inputs: Mapping[str, Sequence[Artifact]]) -> dict[str, tuple[Artifact, ...]]:
    """The inputs by role in the stage's order, empty optional roles left out.

    Raises BuildError naming the role that is unknown, missing, filled twice or filled by the wrong kind of
    stage.
    """
    for role in inputs:
        if role not in stage.inputs:
            raise BuildError(f"{stage.name}: it has no input {role!r}; {nearest(role, stage.inputs)}")
    checked = {}
    for role, spec in stage.inputs.items():
        given = tuple(inputs.get(role, ()))
        if not given:
            if spec.optional:
                continue
            raise BuildError(
                f"{stage.name}: input {role!r} is missing; give an artifact of {' or '.join(spec.stages)}"
            )
        if len(given) > 1 and not spec.many:
            refs = ", ".join(one.ref for one in given)
            raise BuildError(f"{stage.name}: input {role!r} takes one artifact, not {len(given)} ({refs})")
        for one in given:
            if one.stage not in spec.stages:
                kinds = " or ".join(spec.stages)
                raise BuildError(f"{stage.name}: input {role!r} takes an artifact of {kinds}, not {one.ref}")
        checked[role] = given
    return checked


@dataclass
class StageContext:
    """What a running stage is given, and where it reports.

    `events` receives dicts: {"event": "log", "level", "message"} and {"event": "progress", "done", "total",
    ...figures}.
    """

    config: Any
    inputs: Mapping[str, tuple[Artifact, ...]]
    # The payload being made; empty at the start of each try.
    out: Path
    # Survives a killed try (checkpoints, partial logs); never published.
    scratch: Path
    fingerprint: str = ""
    # Whether an earlier try left its scratch folder.
    resumed: bool = False
    # What `Stage.scan` found, for stages that read the outside world.
    sources: tuple[SourceFile, ...] = ()
    events: Callable[[dict[str, Any]], None] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of every random choice."""
        return self.config.seed

    def inputs_of(self, role: str) -> tuple[Artifact, ...]:
        """The artifacts in a role, in the order given; empty when an optional role was left out."""
        return self.inputs.get(role, ())

    def input(self, role: str) -> Artifact:
        """The one artifact in a role; BuildError when there is none or more than one."""
        given = self.inputs_of(role)
        if len(given) != 1:
            raise BuildError(f"input {role!r}: exactly one artifact is needed here, {len(given)} given")
        return given[0]

    def log(self, message: str, level: str = "info") -> None:
        """Say something to whoever watches; it is also kept in the artifact's logs/stage.log."""
        self._emit({"event": "log", "level": level, "message": str(message)})

    def progress(self, done: float, total: float, **figures: float) -> None:
        """Say how far the stage is, with figures worth watching (loss, tokens a second)."""
        self._emit({"event": "progress", "done": done, "total": total, **figures})

    def metric(self, name: str, value: float | int | str | bool) -> None:
        """Record a deterministic figure. It must not depend on the clock or on an interruption."""
        self.metrics[name] = _figure(f"metric {name!r}", value)

    def timing(self, name: str, seconds_or_rate: float) -> None:
        """Record a figure that depends on the machine or the moment (seconds, tokens a second, bytes of
        memory).
        """
        value = _figure(f"timing {name!r}", seconds_or_rate)
        if isinstance(value, (str, bool)):
            raise BuildError(f"timing {name!r}: expected a number, not {value!r}")
        self.timings[name] = float(value)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a plain JSON value into the payload, deterministically and atomically."""
        return atomic_write_json(self.out / name, value)

    def fault(self, point: str) -> None:
        """Pass a fault point (see infra.faults)."""
        fault(point)

    def _emit(self, event: dict[str, Any]) -> None:
        if self.events is not None:
            self.events(event)


def _figure(what: str, value: Any) -> Any:
    """A number, truth value or text as plain Python; numpy and torch scalars are taken too."""
    if not isinstance(value, (bool, int, float, str)) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise BuildError(f"{what} is {value}: record a finite figure, and fail the stage where it went wrong")
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise BuildError(f"{what}: expected a number, text or truth value, not {type(value).__name__}")
