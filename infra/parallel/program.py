"""From a schedule as it is published, phases of so many times a pattern, to a rank's program."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from infra.errors import ConfigError
from infra.parallel.actions import Action, Pair, Schedule, Step

Phase = tuple[int, str]
"""How often, and a pattern such as "B1 F1&B0": what to do with the next micro-batch of which chunk."""


@dataclass(frozen=True)
class Chunk:
    """A stage that a rank holds, and the micro-batches that it sees there, in order."""

    stage: int
    micros: range


def unroll(phases: Iterable[Phase], chunks: Sequence[Chunk]) -> tuple[Step, ...]:
    """The steps of a rank.

    A pattern is words: `F0` is the forward of chunk 0's next micro-batch, `B1` the whole backward of chunk
    1's, `I1` its half for the inputs, `F0&B1` an overlapped pair, and `W` the weight half of the oldest I
    that has none yet, of whichever chunk.
    """
    forwards = [iter(chunk.micros) for chunk in chunks]
    backwards = [iter(chunk.micros) for chunk in chunks]
    waiting: deque[Action] = deque()

    def action(word: str) -> Action:
        if word == "W":
            oldest = waiting.popleft()
            return Action("W", oldest.stage, oldest.micro)
        kind, chunk = word[0], int(word[1:])
        if kind == "F":
            return Action("F", chunks[chunk].stage, next(forwards[chunk]))
        if kind == "B":
            return Action("B", chunks[chunk].stage, next(backwards[chunk]))
        made = Action("I", chunks[chunk].stage, next(backwards[chunk]))
        waiting.append(made)
        return made

    program: list[Step] = []
    for times, pattern in phases:
        words = [word.partition("&") for word in pattern.split()]
        for _ in range(times):
            for first, pair, second in words:
                program.append(Pair(action(first), action(second)) if pair else action(first))
    return tuple(program)


def one_way(
    name: str, stages: int, micro_batches: int, phases: Callable[[int, int, int], Iterable[Phase]]
) -> Schedule:
    """A schedule of one direction, a stage a rank; `phases` of (stage, stages, micro-batches)."""
    micros = range(micro_batches)
    programs = tuple(
        unroll(phases(stage, stages, micro_batches), [Chunk(stage, micros)]) for stage in range(stages)
    )
    return Schedule(name, stages, micro_batches, programs, homes=(tuple(range(stages)),))


@dataclass(frozen=True)
class Demands:
    """What a method asks of the number of stages and of micro-batches."""

    multiple: int = 1
    """Stages and micro-batches are divisible by it: both directions, or both arms of the V, are alike."""
    micro_multiple: int = 1
    per_stage: int = 0
    """Micro-batches, at least, for every stage: fewer would not fill the pipeline."""

    def check(self, name: str, stages: int, micro_batches: int) -> None:
        """Raises:
        ConfigError: Names the field that does not fit, why, and the nearest that does.
        """
        self._divides(name, "stages", stages, self.multiple, self.multiple)
        least = max(self.micro_multiple, self.per_stage * stages)
        if self.per_stage and micro_batches < least:
            raise ConfigError(
                f"micro_batches: {name} fills its {stages} stages with {self.per_stage} micro-batches a "
                f"stage or more, got {micro_batches}; use at least {least}"
            )
        self._divides(name, "micro_batches", micro_batches, self.micro_multiple, least)

    @staticmethod
    def _divides(name: str, field: str, value: int, multiple: int, least: int) -> None:
        least = max(1, least)
        if value < least or value % multiple:
            lower = max(value - value % multiple, least)
            upper = lower + multiple if lower < value else lower
            near = f"{lower} or {upper}" if upper != lower else f"{lower}"
            must = f"a multiple of {multiple}" if multiple > 1 else "1 or more"
            raise ConfigError(f"{field}: {name} needs {must}, got {value}; use {near}")
