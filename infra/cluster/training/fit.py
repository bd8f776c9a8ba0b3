"""Chunk times from the phase times of a real step: what a replay needs, when only sums were published.

ISCA'25 table 4 gives a step's seconds by phase: forward, backward and weight-gradient passes alone, and
overlapped pairs. It does not say of which rank; they are taken as means over all ranks. The published bubble
is not used: it has to come out of the replay.
"""

from __future__ import annotations

from infra.cluster.pipeline.replay import Timeline
from infra.cluster.pipeline.times import Duration, Durations, StageTimes
from infra.cluster.published import Phases
from infra.errors import ConfigError
from infra.parallel.actions import PAIR, Schedule, kind


def fitted(schedule: Schedule, shape: StageTimes, phases: Phases) -> StageTimes:
    """`shape` scaled, each kind of pass by one factor, so that the schedule's passes sum to `phases`.

    `shape` says how the stages compare with each other; with uniform times all are alike. The table's `1B`
    holds the backward passes alone, whole or for inputs only; its `1W` those for weights.

    Raises ConfigError where the schedule has no pass of a kind that the phases have.
    """
    sums = dict.fromkeys(("F", "I", "W", "B", PAIR), 0.0)
    inside = 0.0  # weight gradients within whole backward passes
    for program in schedule.programs:
        for step in program:
            name = kind(step)
            if name == "B":
                sums["I"] += shape.inputs[step.stage].seconds / schedule.ranks
                inside += shape.weights[step.stage].seconds / schedule.ranks
            else:
                sums[name] += shape.of(step).seconds / schedule.ranks
    for name, needed in (
        ("F", phases.forward),
        ("I", phases.backward),
        ("W", phases.weights),
        (PAIR, phases.pair),
    ):
        if needed and not sums[name]:
            raise ConfigError(f"{schedule.name} has no {name} passes to spread {needed} s over")
    # Where no pass is for weights alone, those inside the others take their share of them.
    both = sums["I"] + inside
    weights = phases.weights / sums["W"] if sums["W"] else phases.backward / both if both else 0.0
    rest = phases.backward - weights * inside
    if rest <= 0 and sums["I"]:
        raise ConfigError(
            f"backward passes of {phases.backward} s leave nothing beside {weights * inside:.3g} s of weight "
            "gradients inside them"
        )

    def factor(seconds: float, name: str) -> float:
        return seconds / sums[name] if sums[name] else 0.0

    pairs = _scaled(tuple(shape.pairs.values()), factor(phases.pair, PAIR))
    return StageTimes(
        _scaled(shape.forward, factor(phases.forward, "F")),
        _scaled(shape.inputs, factor(rest, "I")),
        _scaled(shape.weights, weights),
        pairs=dict(zip(shape.pairs, pairs, strict=True)),
    )


def mean_phases(timeline: Timeline, optimizer: float) -> Phases:
    """The same sums of a replay, means over its ranks."""
    ranks = len(timeline.rows)
    mean = {name: sum(row[name] for row in timeline.phases) / ranks for name in timeline.phases[0]}
    bubble = sum(timeline.bubbles) / ranks
    backward = mean["I"] + mean["B"]
    return Phases(
        mean["F"], backward, mean["W"], mean[PAIR], bubble, optimizer, timeline.makespan + optimizer
    )


def _scaled(row: Durations, factor: float) -> Durations:
    return tuple(Duration(each.seconds * factor, each.exposed * factor) for each in row)
