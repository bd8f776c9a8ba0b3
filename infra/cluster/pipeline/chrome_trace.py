"""Timelines as Chrome traces, which Perfetto opens, and durations back out of traces, ours or a training
run's."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from infra.cluster.pipeline.replay import Timeline
from infra.cluster.pipeline.times import Duration, Durations, StageTimes
from infra.errors import HeadwaterError
from infra.files import atomic_write_text
from infra.parallel.actions import KINDS, PAIR, Pair, Step, kind

TraceEvent: TypeAlias = dict[str, Any]
MICROSECONDS = 1e6
"""In a second; a trace counts in them."""
ON_DEVICE = "gpu_user_annotation"
"""The profiler's category for when the kernels inside an annotation ran, beside when they were launched."""


class TraceError(HeadwaterError):
    """A file is no trace, or not one of the kind asked for."""


def write(timeline: Timeline, path: Path) -> None:
    """Write a timeline as a Chrome trace: one track a rank, one complete event a step, times in microseconds.

    Events are named F, B, I, W and F&B, with the stage and micro-batch as arguments (of a pair those of the
    forward, and `backward_stage` and `backward_micro`), and `exposed_us` where any of it is. Folders that are
    missing are made; the file is there whole or as it was before.

    Raises:
        HeadwaterError: The file cannot be written.
    """
    schedule = timeline.schedule
    title = f"{schedule.name}, {schedule.stages} stages, {schedule.micro_batches} micro-batches"
    events: list[TraceEvent] = [_named("process_name", 0, title)]
    for rank, row in enumerate(timeline.rows):
        events.append(_named("thread_name", _track(rank), f"rank {rank}"))
        for event in row:
            args = _arguments(event.step)
            if event.exposed:
                args["exposed_us"] = float(event.exposed * MICROSECONDS)
            events.append(
                {
                    "name": kind(event.step),
                    "cat": "pipeline",
                    "ph": "X",
                    "pid": 1,
                    "tid": _track(rank),
                    "ts": float(event.start * MICROSECONDS),
                    "dur": float(event.seconds * MICROSECONDS),
                    "args": args,
                }
            )
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))
    try:
        atomic_write_text(path, text + "\n", points=None)
    except OSError as error:
        raise HeadwaterError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_times(paths: Path | Iterable[Path]) -> StageTimes:
    """Durations of a pipeline's actions: the median over micro-batches and steps, by stage.

    Reads traces that `write` made, and those of a training run whose steps are annotated alike: an event
    named by `str(step)`, or by its kind with `stage` and `micro` as arguments. All else is passed over. Where
    a profiler recorded when an annotation's kernels ran, that is taken and not when they were launched. A
    training run has a file a rank; give all of them.

    Raises:
        TraceError: A file is no trace or none has such events, a duration is negative, or a stage is missing.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    found: dict[tuple[str, tuple[int, ...]], list[Duration]] = defaultdict(list)
    for path in paths:
        for key, durations in _durations(path).items():
            found[key] += durations
    told = ", ".join(map(str, paths)) or "no file was given"
    if not found:
        raise TraceError(
            f"{told}: no event is named F, B, I, W or F&B with a stage; annotate the training steps"
        )
    medians = {key: _median(durations) for key, durations in found.items()}
    stages = 1 + max(stage for _, numbers in medians for stage in numbers)

    def row(name: str) -> dict[int, Duration]:
        return {numbers[0]: value for (kind_, numbers), value in medians.items() if kind_ == name}

    forward, inputs, weights, backward = (row(name) for name in ("F", "I", "W", "B"))
    split = inputs.keys() & weights.keys()
    whole = {stage: inputs[stage] + weights[stage] for stage in split} | backward
    if len(split) < stages:
        inputs = weights = {}
    pairs = {(numbers[0], numbers[1]): value for (name, numbers), value in medians.items() if name == PAIR}
    return StageTimes(
        _full(told, "F", forward, stages),
        _full(told, "I", inputs, stages) if inputs else (),
        _full(told, "W", weights, stages) if weights else (),
        _full(told, "B", whole, stages),
        pairs,
    )


def read_events(path: Path) -> list[TraceEvent]:
    """The complete events (phase X) of a Chrome trace, plain or gzipped, each with a dict `args`.

    `ts` and `dur` are microseconds, finite and not negative in length.

    Raises:
        TraceError: The file cannot be read, is not JSON or no trace, or an event's times are not possible.
    """
    try:
        content = path.read_bytes()
        document = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise TraceError(f"{path}: is not JSON: {error}") from error
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise TraceError(f"{path}: has no list `traceEvents`, so it is no Chrome trace")
    complete = [event for event in events if isinstance(event, dict) and event.get("ph") == "X"]
    if not complete:
        raise TraceError(f"{path}: holds no complete events (phase X)")
    for event in complete:
        _possible(path, event)
        if not isinstance(event.get("args"), dict):
            event["args"] = {}
    return complete


def _possible(path: Path, event: TraceEvent) -> None:
    for field in ("ts", "dur"):
        value = event.get(field)
        if not _number(value):
            raise TraceError(f"{path}: event {event.get('name')!r} has {field} {value!r}, which is no number")
    if event["dur"] < 0:
        raise TraceError(f"{path}: event {event.get('name')!r} at {event['ts']} lasts {event['dur']} us")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _durations(path: Path) -> dict[tuple[str, tuple[int, ...]], list[Duration]]:
    """Of one file, by kind and stages."""
    steps = list(_steps(path, read_events(path)))
    if any(event.get("cat") == ON_DEVICE for _, _, event in steps):
        steps = [step for step in steps if step[2].get("cat") == ON_DEVICE]
    spans: dict[Any, list[TraceEvent]] = defaultdict(list)
    for number, (name, stages, event) in enumerate(steps):
        # On the device an annotation has one event a stream, which one id holds together.
        external = event["args"].get("External id") if event.get("cat") == ON_DEVICE else None
        spans[name, stages, ("alone", number) if external is None else external].append(event)
    found: dict[tuple[str, tuple[int, ...]], list[Duration]] = defaultdict(list)
    for (name, stages, _), events in spans.items():
        start, end = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
        seconds = (end - start) / MICROSECONDS if len(events) > 1 else events[0]["dur"] / MICROSECONDS
        exposed = events[0]["args"].get("exposed_us", 0)
        if not _number(exposed) or exposed < 0:
            raise TraceError(f"{path}: event {name!r} at {start} has exposed_us {exposed!r}")
        found[name, stages].append(Duration(seconds, min(exposed / MICROSECONDS, seconds)))
    return found


def _steps(path: Path, events: Iterable[TraceEvent]) -> Iterator[tuple[str, tuple[int, ...], TraceEvent]]:
    """(kind, stages, event) of the events that are a schedule's steps."""
    for event in events:
        name, _, rest = str(event.get("name")).partition(" ")
        if name != PAIR and name not in KINDS:
            continue
        stated = event["args"] | {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", rest)}
        wanted = ("stage", "backward_stage") if name == PAIR else ("stage",)
        stages = tuple(stated.get(key) for key in wanted)
        if not all(isinstance(stage, int) and stage >= 0 for stage in stages):
            raise TraceError(
                f"{path}: event {event['name']!r} at {event['ts']} names no {' and '.join(wanted)}"
            )
        yield name, stages, event


def _median(durations: list[Duration]) -> Duration:
    return Duration(median(d.seconds for d in durations), median(d.exposed for d in durations))


def _full(told: str, name: str, row: dict[int, Duration], stages: int) -> Durations:
    missing = next((stage for stage in range(stages) if stage not in row), None)
    if missing is not None:
        raise TraceError(
            f"{told}: no {name} of stage {missing} of {stages} is there; give every rank's trace"
        )
    return tuple(row[stage] for stage in range(stages))


def _arguments(step: Step) -> dict[str, Any]:
    if not isinstance(step, Pair):
        return {"stage": step.stage, "micro": step.micro}
    forward, backward = step.forward, step.backward
    return {
        "stage": forward.stage,
        "micro": forward.micro,
        "backward_stage": backward.stage,
        "backward_micro": backward.micro,
    }


def _track(rank: int) -> int:
    """Perfetto takes thread 0 for the idle task."""
    return rank + 1


def _named(what: str, track: int, name: str) -> TraceEvent:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}
