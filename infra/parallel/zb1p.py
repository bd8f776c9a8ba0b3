"""ZB1P: 1F1B whose backward is split, so that weight gradients fill the bubble (ZeroBubble's ZB-H1)."""

from __future__ import annotations

from infra.parallel.actions import Schedule
from infra.parallel.program import Demands, Phase, one_way

NAME = "zb1p"
DEMANDS = Demands()


def zb1p(stages: int, micro_batches: int) -> Schedule:
    """The ZB1P schedule: bubble (PP-1)(F+B-2W), one copy of parameters, PP micro-batches live (Table 2).

    Raises:
        ConfigError: `stages` or `micro_batches` is not positive.
    """
    DEMANDS.check(NAME, stages, micro_batches)
    return one_way(NAME, stages, micro_batches, phases)


def phases(stage: int, stages: int, micro_batches: int) -> tuple[Phase, ...]:
    """The program of one stage.

    The order of F and I is 1F1B's. Stage s runs its W late by s micro-batches: it holds s fewer micro-batches
    of its own in flight than stage 0, so with s of them waiting for their W every stage holds PP, and its s
    weight gradients of the end are what fills the wait for the stages before it.
    """
    ahead = min(stages - 1 - stage, micro_batches)
    late = min(stage, micro_batches - ahead)
    return (
        (ahead, "F0"),
        (late, "F0 I0"),
        (micro_batches - ahead - late, "F0 I0 W"),
        (ahead, "I0 W"),
        (late, "W"),
    )
