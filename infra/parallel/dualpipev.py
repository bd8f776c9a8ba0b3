"""DualPipeV: DualPipe cut in half. Each rank holds both stages of a V, so half the devices and no second
copy ("cut-in-half", Sea AI Lab; DualPipe's README)."""

from __future__ import annotations

from infra.parallel.actions import Schedule
from infra.parallel.dualpipe import eight_steps
from infra.parallel.program import Chunk, Demands, unroll

NAME = "dualpipev"
DEMANDS = Demands(multiple=2, per_stage=1)


def dualpipev(stages: int, micro_batches: int) -> Schedule:
    """The DualPipeV schedule on stages/2 ranks: DualPipe's bubble and live micro-batches, parameters once.

    Rank r holds stages r and PP-1-r: micro-batches go down the ranks, turn on the last and come back. It runs
    what DualPipe's rank r runs, and what was the other direction there is the way back here.

    Raises:
        ConfigError: `stages` is odd, or there are fewer micro-batches than stages.
    """
    DEMANDS.check(NAME, stages, micro_batches)
    ranks, micros = stages // 2, range(micro_batches)
    programs = tuple(
        unroll(
            eight_steps(rank, ranks, micro_batches), [Chunk(rank, micros), Chunk(stages - 1 - rank, micros)]
        )
        for rank in range(ranks)
    )
    down = tuple(range(ranks))
    return Schedule(NAME, stages, micro_batches, programs, homes=(down + down[::-1],))
