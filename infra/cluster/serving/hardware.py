"""Computers at home that hold a whole model in their own memory.

Every figure is a data sheet's or says which public measurement it was read from; none is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.errors import ConfigError


@dataclass(frozen=True)
class Host:
    """A computer that holds the weights in its own memory, with or without a GPU beside it.

    Bandwidths in bytes a second, memory in bytes; zero for a GPU that is not there.
    """

    name: str
    memory: float
    memory_bandwidth: float
    gpu_memory: float = 0.0
    gpu_memory_bandwidth: float = 0.0

    def __post_init__(self) -> None:
        for name in ("memory", "memory_bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"host.{name} is {getattr(self, name)}: it must be positive")
        if (self.gpu_memory > 0) != (self.gpu_memory_bandwidth > 0):
            raise ConfigError(
                "host.gpu_memory and host.gpu_memory_bandwidth describe one GPU: give both or neither"
            )


AI_SOC = Host("AI SoC, 256-bit LPDDR5X-8000", memory=128e9, memory_bandwidth=256e9)
"""A PC with one chip for everything: 32 bytes x 8.0 GT/s (the data sheet of AMD's Ryzen AI Max+ 395)."""

AI_SOC_WIDE = Host("AI SoC, 512-bit LPDDR5X-8533", memory=128e9, memory_bandwidth=546e9)
"""The same with twice the bus: 64 bytes x 8.533 GT/s (the data sheet of Apple's M4 Max)."""

TWO_SOCKETS = Host(
    "two Xeon sockets, 16 x DDR5-4800, RTX 4090",
    memory=1024e9,
    memory_bandwidth=2 * 8 * 38.4e9,
    gpu_memory=24e9,
    gpu_memory_bandwidth=1008e9,
)
"""The machine on which KTransformers publishes its speeds (its DeepSeek-R1/V3 tutorial)."""
