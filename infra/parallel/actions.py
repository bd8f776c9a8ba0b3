"""The words of a pipeline schedule: actions, overlapped pairs, and the program of every rank.

A schedule is data. The executor runs it, the simulator replays it, `check` proves it; none of them knows
which method it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from infra.errors import ConfigError

Kind: TypeAlias = Literal["F", "B", "I", "W"]
KINDS: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward for inputs",
    "W": "backward for weights",
}
PAIR = "F&B"
"""What a pair is called beside the four kinds, in traces, tables and pictures."""


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one micro-batch through one stage: F, the whole backward B, or its halves I and W.

    The halves are ZeroBubble's: I computes the gradient of the stage's inputs, which the stage before waits
    for, W the gradient of its weights, which nothing waits for.
    """

    kind: Kind
    stage: int
    micro: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"an action's kind is one of {', '.join(KINDS)}, got {self.kind!r}")

    def __str__(self) -> str:
        """As the executor annotates it in a profile, and `chrome_trace` reads it back."""
        return f"{self.kind} stage={self.stage} micro={self.micro}"


@dataclass(frozen=True, slots=True)
class Pair:
    """The forward of one micro-batch and the whole backward of another, overlapped on one rank.

    Each hides the other's all-to-all behind its own computation (report §3.2.1).
    """

    forward: Action
    backward: Action

    def __post_init__(self) -> None:
        if (self.forward.kind, self.backward.kind) != ("F", "B"):
            raise ConfigError(
                f"a pair overlaps F with B, got {self.forward.kind} with {self.backward.kind}: "
                "leave other actions unpaired"
            )

    def __str__(self) -> str:
        forward, backward = self.forward, self.backward
        return (
            f"{PAIR} stage={forward.stage} micro={forward.micro} "
            f"backward_stage={backward.stage} backward_micro={backward.micro}"
        )


Step: TypeAlias = Action | Pair


def actions(step: Step) -> tuple[Action, ...]:
    """The actions of a step: one, or the two of a pair."""
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


def kind(step: Step) -> str:
    """`F`, `B`, `I`, `W` or `F&B`."""
    return PAIR if isinstance(step, Pair) else step.kind


@dataclass(frozen=True)
class Schedule:
    """What every rank runs, in order, and where every stage lives.

    `homes[direction][stage]` is the rank that runs the stage for the micro-batches of that direction. Methods
    with one direction have one row; DualPipe has two, the second in reverse, and so two copies of every
    stage's parameters. Micro-batches are numbered over both: the first half belongs to direction 0.
    """

    name: str
    stages: int
    micro_batches: int
    programs: tuple[tuple[Step, ...], ...]
    homes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.homes or any(len(row) != self.stages for row in self.homes):
            raise ConfigError(f"homes: every direction names a rank for each of the {self.stages} stages")
        if self.micro_batches < 1 or self.micro_batches % len(self.homes):
            raise ConfigError(
                f"micro_batches: {self.micro_batches} cannot be shared out over {len(self.homes)} directions"
            )
        if {rank for row in self.homes for rank in row} != set(range(self.ranks)):
            raise ConfigError(f"homes: the {self.ranks} programs need ranks 0 to {self.ranks - 1}, all used")

    @property
    def ranks(self) -> int:
        """Devices along the pipeline."""
        return len(self.programs)

    def direction(self, micro: int) -> int:
        """The row of `homes` that a micro-batch follows."""
        return micro * len(self.homes) // self.micro_batches

    def rank_of(self, stage: int, micro: int) -> int:
        """The rank that runs this stage for this micro-batch."""
        return self.homes[self.direction(micro)][stage]

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """The stages whose parameters each rank holds: one, or DualPipe's and DualPipeV's two."""
        places = [{stage for row in self.homes for stage in range(self.stages) if row[stage] == rank}
                  for rank in range(self.ranks)]  # fmt: skip
        return tuple(tuple(sorted(stages)) for stages in places)

    @property
    def copies(self) -> float:
        """Copies of the model's parameters that the pipeline holds: 1, or DualPipe's 2."""
        return sum(map(len, self.held)) / self.stages
