"""How long each action of a pipeline takes, stage by stage: what a replay is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TypeAlias

from infra.errors import ConfigError
from infra.parallel.actions import Pair, Step


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds, and the part of them in which only communication runs. Integers stay exact."""

    seconds: float
    exposed: float = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.seconds) and 0 <= self.exposed <= self.seconds):
            raise ConfigError(
                f"a duration is finite, its exposed part between 0 and the whole: got {self.seconds} s with "
                f"{self.exposed} s exposed"
            )

    def __add__(self, other: Duration) -> Duration:
        return Duration(self.seconds + other.seconds, self.exposed + other.exposed)


Durations: TypeAlias = tuple[Duration, ...]


@dataclass(frozen=True)
class StageTimes:
    """Durations of F, I, W and B by stage, and of pairs by (stage of the forward, stage of the backward).

    `backward` is the whole backward in one go; without it I and then W. I and W may both be left out where no
    schedule splits the backward. A pair that `pairs` does not give hides nothing: it takes as long as its two
    halves.
    """

    forward: Durations
    inputs: Durations = ()
    weights: Durations = ()
    backward: Durations = ()
    pairs: Mapping[tuple[int, int], Duration] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.backward and len(self.inputs) == len(self.weights):
            whole = tuple(first + then for first, then in zip(self.inputs, self.weights, strict=True))
            object.__setattr__(self, "backward", whole)
        for name in ("forward", "inputs", "weights", "backward"):
            given = len(getattr(self, name))
            needed = name in ("forward", "backward")
            if ((given or needed) and given != self.stages) or not self.stages:
                raise ConfigError(
                    f"{name}: there is one duration a stage, as many as forward's {self.stages}; got {given}"
                )
        outside = [pair for pair in self.pairs if not all(0 <= stage < self.stages for stage in pair)]
        if outside:
            raise ConfigError(f"pairs: {outside[0]} names a stage beyond the {self.stages} there are")

    @classmethod
    def uniform(
        cls,
        stages: int,
        forward: float,
        inputs: float,
        weights: float,
        backward: float | None = None,
        pair: float | None = None,
    ) -> StageTimes:
        """The same seconds for every stage and every pair of stages, with nothing exposed."""

        def row(seconds: float) -> Durations:
            return (Duration(seconds),) * stages

        pairs = {} if pair is None else {(i, j): Duration(pair) for i in range(stages) for j in range(stages)}
        whole = () if backward is None else row(backward)
        return cls(row(forward), row(inputs), row(weights), whole, pairs)

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.forward)

    def of(self, step: Step) -> Duration:
        """How long a step takes.

        Raises:
            ConfigError: It is an I or W, and these were left out.
        """
        if isinstance(step, Pair):
            stages = (step.forward.stage, step.backward.stage)
            given = self.pairs.get(stages)
            return given if given is not None else self.forward[stages[0]] + self.backward[stages[1]]
        row = {"F": self.forward, "I": self.inputs, "W": self.weights, "B": self.backward}[step.kind]
        if not row:
            raise ConfigError(f"times: nothing says how long `{step}` takes; give inputs and weights")
        return row[step.stage]
