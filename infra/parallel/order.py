"""An order in which a schedule's steps can run, and what each waits for: what check and replay share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from infra.errors import HeadwaterError
from infra.parallel.actions import Action, Schedule, Step, actions

Result: TypeAlias = tuple[str, int, int]
"""(F, I or W; stage; micro-batch): what an action leaves for others. B leaves I and W."""


class Deadlock(HeadwaterError):
    """The ranks of a schedule wait for one another, or for something that no program makes."""


def needs(action: Action, stages: int) -> tuple[Result, ...]:
    """The results that an action starts from: the neighbouring stage's, and the stage's own forward."""
    kind, stage, micro = action.kind, action.stage, action.micro
    if kind == "F":
        return (("F", stage - 1, micro),) if stage else ()
    if kind == "W":
        return (("I", stage, micro),)
    own: Result = ("F", stage, micro)
    return (own, ("I", stage + 1, micro)) if stage < stages - 1 else (own,)


def makes(action: Action) -> tuple[Result, ...]:
    """The results that an action leaves."""
    kind, stage, micro = action.kind, action.stage, action.micro
    return (("I", stage, micro), ("W", stage, micro)) if kind == "B" else ((kind, stage, micro),)


def in_order(schedule: Schedule) -> Iterator[tuple[int, Step]]:
    """(rank, step), every rank's in its program's order and each after all that it waits for.

    Raises:
        Deadlock: No such order exists; names what each rank that is stuck waits for.
    """
    programs, stages = schedule.programs, schedule.stages
    at = [0] * schedule.ranks
    done: set[Result] = set()
    sleepers: dict[Result, list[int]] = {}
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        program = programs[rank]
        while at[rank] < len(program):
            step = program[at[rank]]
            missing = _missing(step, stages, done)
            if missing is not None:
                sleepers.setdefault(missing, []).append(rank)
                break
            at[rank] += 1
            for action in actions(step):
                for result in makes(action):
                    done.add(result)
                    ready.extend(sleepers.pop(result, ()))
            yield rank, step
    stuck = [rank for rank in range(schedule.ranks) if at[rank] < len(programs[rank])]
    if stuck:
        raise Deadlock(_told(schedule, at, stuck, sleepers))


def _missing(step: Step, stages: int, done: set[Result]) -> Result | None:
    for action in actions(step):
        for result in needs(action, stages):
            if result not in done:
                return result
    return None


def _told(schedule: Schedule, at: list[int], stuck: list[int], sleepers: dict[Result, list[int]]) -> str:
    """The first ranks that are stuck, and on what."""
    awaited = {rank: result for result, ranks in sleepers.items() for rank in ranks}
    lines = []
    for rank in stuck[:4]:
        kind, stage, micro = awaited[rank]
        lines.append(
            f"rank {rank} waits before `{schedule.programs[rank][at[rank]]}` for {kind} of stage {stage}, "
            f"micro-batch {micro}"
        )
    more = f"; and {len(stuck) - 4} more ranks" if len(stuck) > 4 else ""
    return f"{schedule.name}: {len(stuck)} ranks cannot go on: " + "; ".join(lines) + more
