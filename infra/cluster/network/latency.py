"""Latency of a small message, by the kind of link and the switches on its way (ISCA'25, table 5)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from infra.cluster.origin import Origin
from infra.errors import ConfigError

SAME_LEAF, CROSS_LEAF = 1, 3
"""Switches that a message passes: its leaf alone, or leaf, spine and leaf."""


@dataclass(frozen=True)
class Latency:
    """End-to-end latency of 64 bytes between two GPUs, in seconds, as measured by others."""

    name: str
    same_leaf: float
    cross_leaf: float | None
    """None where there is no second layer."""
    origin: Origin = Origin.PUBLISHED

    def __post_init__(self) -> None:
        crossed = self.same_leaf if self.cross_leaf is None else self.cross_leaf
        if not (isfinite(crossed) and 0 < self.same_leaf <= crossed):
            raise ConfigError(
                f"latency of {self.name}: same_leaf ({self.same_leaf}) must be positive and no more than "
                f"cross_leaf ({self.cross_leaf})"
            )

    @property
    def a_switch(self) -> float:
        """Seconds that one switch more adds. Raises ConfigError where there is one layer only."""
        if self.cross_leaf is None:
            raise ConfigError(f"{self.name} has no latency across leaves: its messages pass one switch")
        return (self.cross_leaf - self.same_leaf) / (CROSS_LEAF - SAME_LEAF)

    def across(self, switches: int) -> float:
        """Seconds of a message that passes `switches` switches.

        One and three are the published measurements; other numbers are on the straight line through them.
        """
        if switches < 1:
            raise ConfigError(f"switches is {switches}: a message passes at least 1")
        return self.same_leaf + ((switches - 1) * self.a_switch if switches > 1 else 0.0)


ROCE = Latency("RoCE", 3.6e-6, 5.6e-6)
INFINIBAND = Latency("InfiniBand", 2.8e-6, 3.7e-6)
NVLINK = Latency("NVLink", 3.33e-6, None)
LATENCIES = (ROCE, INFINIBAND, NVLINK)
