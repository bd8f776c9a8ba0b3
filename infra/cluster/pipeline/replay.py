"""Discrete-event replay of a pipeline schedule: when every rank does what, how long it idles, how much it
holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from infra.cluster.pipeline.times import StageTimes
from infra.errors import ConfigError
from infra.parallel.actions import PAIR, Schedule, Step, actions, kind
from infra.parallel.order import Result, in_order, makes, needs

PHASES = ("F", "I", "W", "B", PAIR)


@dataclass(frozen=True, slots=True)
class Event:
    """A step that ran. `start` and `end` in seconds from the first start; `exposed` of them communication."""

    rank: int
    step: Step
    start: float
    end: float
    exposed: float = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """What every rank of a pipeline did in one training step: `rows[rank]` in order of time."""

    schedule: Schedule
    rows: tuple[tuple[Event, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((row[-1].end for row in self.rows if row), default=0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds in which each rank runs a step. Communication exposed within a step counts as busy."""
        return tuple(sum(event.seconds for event in row) for row in self.rows)

    @cached_property
    def bubbles(self) -> tuple[float, ...]:
        """Seconds in which each rank idles, from the first start of any rank to the last end of any."""
        return tuple(self.makespan - busy for busy in self.busy)

    @cached_property
    def exposed(self) -> tuple[float, ...]:
        """Seconds of its steps in which each rank only communicates."""
        return tuple(sum(event.exposed for event in row) for row in self.rows)

    @cached_property
    def phases(self) -> tuple[dict[str, float], ...]:
        """Seconds of each rank by kind of step: F, I, W and B alone, and pairs."""
        sums = tuple(dict.fromkeys(PHASES, 0) for _ in self.rows)
        for row, by_kind in zip(self.rows, sums, strict=True):
            for event in row:
                by_kind[kind(event.step)] += event.seconds
        return sums

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The most micro-batches whose activations each rank holds at once, over all stages it holds.

        A micro-batch is held from the start of its F to the end of its B or W: I frees nothing, since W still
        needs the inputs of every matrix product. In a pair the forward's are there before the backward's are
        gone: this is the one more that DualPipe holds.
        """
        return self.peak((1,) * self.schedule.stages)

    def peak(self, weights: Sequence[float]) -> tuple[float, ...]:
        """As `live`, with each held micro-batch weighing `weights[stage]`, such as its bytes there."""
        return tuple(
            sum(weights[stage] * count for stage, count in held.items())
            for held in fullest(self.schedule, weights)
        )


def fullest(schedule: Schedule, weights: Sequence[float]) -> tuple[dict[int, int], ...]:
    """Micro-batches that each rank holds when they weigh most, by stage, for all the stages it has.

    Each weighs `weights[stage]`. No duration plays a part: ranks run their programs in order.
    """
    found = []
    for rank, program in enumerate(schedule.programs):
        held = dict.fromkeys(schedule.held[rank], 0)
        weight: float = 0
        most: float = 0
        at_most = dict(held)
        for step in program:
            parts = actions(step)
            for part in parts:
                if part.kind == "F":
                    held[part.stage] += 1
                    weight += weights[part.stage]
            if weight > most:
                most, at_most = weight, dict(held)
            for part in parts:
                if part.kind in "BW":
                    held[part.stage] -= 1
                    weight -= weights[part.stage]
        found.append(at_most)
    return tuple(found)


def replay(schedule: Schedule, times: StageTimes, transfer: float = 0) -> Timeline:
    """Run a schedule on paper.

    Every rank runs its program in order. A step starts when its rank is free and all of its inputs are there:
    what another rank made arrives `transfer` seconds after the step that made it ended, while both go on.
    Where times are integers (or fractions) so are the results.

    Raises:
        ConfigError: `times` is for another number of stages, or `transfer` is negative.
        Deadlock: The schedule cannot run.
    """
    if times.stages != schedule.stages:
        raise ConfigError(f"times: {times.stages} stages have times, {schedule.name} has {schedule.stages}")
    if not transfer >= 0:
        raise ConfigError(f"transfer: seconds between ranks cannot be {transfer}; use 0 or more")
    rows: list[list[Event]] = [[] for _ in range(schedule.ranks)]
    ends: dict[Result, tuple[float, int]] = {}
    for rank, step in in_order(schedule):
        start: float = rows[rank][-1].end if rows[rank] else 0
        for action in actions(step):
            for result in needs(action, schedule.stages):
                ended, where = ends[result]
                start = max(start, ended if where == rank else ended + transfer)
        duration = times.of(step)
        end = start + duration.seconds
        rows[rank].append(Event(rank, step, start, end, duration.exposed))
        for action in actions(step):
            for result in makes(action):
                ends[result] = (end, rank)
    return Timeline(schedule, tuple(map(tuple, rows)))
