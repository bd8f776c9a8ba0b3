"""1F1B: every stage runs ahead by as many forwards as there are stages after it, then alternates."""

from __future__ import annotations

from infra.parallel.actions import Schedule
from infra.parallel.program import Demands, Phase, one_way

NAME = "1f1b"
DEMANDS = Demands()


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """The 1F1B schedule (PipeDream-Flush): bubble (PP-1)(F+B), one copy, PP micro-batches live (Table 2).

    Raises:
        ConfigError: `stages` or `micro_batches` is not positive.
    """
    DEMANDS.check(NAME, stages, micro_batches)
    return one_way(NAME, stages, micro_batches, phases)


def phases(stage: int, stages: int, micro_batches: int) -> tuple[Phase, ...]:
    """The program of one stage."""
    ahead = min(stages - 1 - stage, micro_batches)
    return (
        (ahead, "F0"),
        (micro_batches - ahead, "F0 B0"),
        (ahead, "B0"),
    )
