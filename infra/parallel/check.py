"""Proof that a schedule is one: every micro-batch passes every stage once each way, where the stage lives,
and no rank waits for ever."""

from __future__ import annotations

from collections import Counter

from infra.errors import HeadwaterError
from infra.parallel.actions import Action, Schedule, actions
from infra.parallel.order import in_order


class ScheduleError(HeadwaterError):
    """A schedule leaves something out, does it twice, or does it on the wrong rank."""


def check(schedule: Schedule) -> None:
    """Prove that every (stage, micro-batch) has one F and one B, or one I and later one W, on its rank.

    That F comes after the stage before, a backward after the stage behind and after its own F, and W after
    its I, without a cycle, is proved by running the programs: each rank in its order, each step when what it
    needs is there.

    Raises:
        ScheduleError: Names the stage, the micro-batch, the rank and what is wrong.
        Deadlock: The ranks wait for one another.
    """
    found: Counter[Action] = Counter()
    for rank, program in enumerate(schedule.programs):
        for step in program:
            for action in actions(step):
                _stands_right(schedule, rank, action)
                found[action] += 1
    for stage in range(schedule.stages):
        for micro in range(schedule.micro_batches):
            forward, whole, inputs, weights = (
                found[Action(kind, stage, micro)] for kind in ("F", "B", "I", "W")
            )
            if forward != 1 or (whole, inputs, weights) not in ((1, 0, 0), (0, 1, 1)):
                raise ScheduleError(
                    f"{schedule.name}: stage {stage}, micro-batch {micro} has {forward} F, {whole} B, "
                    f"{inputs} I and {weights} W; it needs one F and one B, or one F, one I and one W"
                )
    for _ in in_order(schedule):
        pass


def _stands_right(schedule: Schedule, rank: int, action: Action) -> None:
    if not (0 <= action.stage < schedule.stages and 0 <= action.micro < schedule.micro_batches):
        raise ScheduleError(
            f"{schedule.name}: rank {rank} has `{action}`, but there are {schedule.stages} stages and "
            f"{schedule.micro_batches} micro-batches"
        )
    home = schedule.rank_of(action.stage, action.micro)
    if home != rank:
        raise ScheduleError(f"{schedule.name}: `{action}` stands on rank {rank}, its stage lives on {home}")
