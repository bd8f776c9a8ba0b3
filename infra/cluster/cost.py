"""GPU-hours and dollars of a training run by its phases, each with the origin of its figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from infra.cluster.origin import Origin, origins
from infra.errors import ConfigError

TRILLION = 1e12


@dataclass(frozen=True)
class Phase:
    """One part of a run."""

    name: str
    gpu_hours: float
    origin: Origin

    def __post_init__(self) -> None:
        if not (isfinite(self.gpu_hours) and self.gpu_hours >= 0):
            raise ConfigError(f"phase {self.name}: gpu_hours is {self.gpu_hours}: it must be 0 or more")
        if self.origin not in tuple(Origin):
            raise ConfigError(
                f"phase {self.name}: origin is {self.origin!r}: it must be one of {', '.join(Origin)}"
            )


@dataclass(frozen=True)
class Sum:
    """A sum of phases, which says where all its parts come from."""

    gpu_hours: float
    dollars: float
    origins: tuple[Origin, ...]

    @property
    def label(self) -> str:
        """Such as "predicted + published input"."""
        return " + ".join(self.origins)


@dataclass(frozen=True)
class Bill:
    """The phases of a run at one price."""

    phases: tuple[Phase, ...]
    dollars_an_hour: float
    """Of one GPU."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("a bill without phases: give at least one")
        if not (isfinite(self.dollars_an_hour) and self.dollars_an_hour >= 0):
            raise ConfigError(f"dollars_an_hour is {self.dollars_an_hour}: it must be 0 or more, such as 2.0")
        names = [phase.name for phase in self.phases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"phases {', '.join(twice)} appear twice: give each its own name")

    def dollars(self, phase: Phase) -> float:
        return phase.gpu_hours * self.dollars_an_hour

    def total(self) -> Sum:
        """Of all phases, whatever their origins: the sum carries them."""
        return self._sum(self.phases)

    def _sum(self, phases: Sequence[Phase]) -> Sum:
        hours = sum(phase.gpu_hours for phase in phases)
        return Sum(hours, hours * self.dollars_an_hour, origins(phase.origin for phase in phases))


def of_steps(
    name: str,
    tokens: float,
    tokens_a_step: float,
    step_seconds: float,
    gpus: int,
    origin: Origin,
) -> Phase:
    """A phase of `tokens` tokens from the time of one step. `origin` is that of `step_seconds`."""
    for field, value in (("tokens_a_step", tokens_a_step), ("step_seconds", step_seconds), ("gpus", gpus)):
        if not (isfinite(value) and value > 0):
            raise ConfigError(f"phase {name}: {field} is {value}: it must be positive")
    return Phase(name, tokens / tokens_a_step * step_seconds * gpus / 3600, origin)


def of_rate(name: str, tokens: float, hours_a_trillion: float, origin: Origin) -> Phase:
    """A phase of `tokens` tokens from GPU-hours for a trillion. `origin` is that of the rate."""
    return Phase(name, tokens / TRILLION * hours_a_trillion, origin)


def days(gpu_hours: float, gpus: int) -> float:
    """Days that `gpu_hours` take on `gpus` GPUs."""
    if gpus < 1:
        raise ConfigError(f"gpus is {gpus}: it must be at least 1")
    return gpu_hours / gpus / 24


V3_PUBLISHED = (
    of_rate("pretraining", 14.8 * TRILLION, 180e3, Origin.PUBLISHED),
    Phase("context extension", 119e3, Origin.PUBLISHED),
    Phase("post-training", 5e3, Origin.PUBLISHED),
)
"""DeepSeek-V3 on H800 (report table 1 and §1: 14.8T tokens at 180K GPU-hours a trillion). Research and
earlier experiments are not in it."""
R1_PUBLISHED = (
    Phase("R1-Zero", 101e3, Origin.PUBLISHED),
    Phase("SFT data", 5e3, Origin.PUBLISHED),
    Phase("R1", 41e3, Origin.PUBLISHED),
)
"""DeepSeek-R1 on H800, on top of V3 (Nature 645:633, 2025): 512 GPUs for 198 hours, then for 80."""
PUBLISHED_PRICE = 2.0
"""Dollars an hour of one H800, which both papers assume."""
