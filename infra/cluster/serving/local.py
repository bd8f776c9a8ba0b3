"""One request on one computer at home: how fast memory can hand over the weights of a token (ISCA §2.2.2).

A token reads every weight that it is multiplied with once, and its latent cache. Experts make that a small
part of the model, so that memory which is large and not fast will do. Bounds, not forecasts: computation and
what is lost between kernels come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.counts.accounting import cache_bytes, parameters
from infra.cluster.counts.weights import Part
from infra.cluster.serving.hardware import Host
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError

FOUR_BITS = 0.5
"""Bytes a weight, scales not counted."""
Q4_K = 144 / 256
"""Bytes a weight of llama.cpp's Q4_K, with its scales: 144 bytes for 256 weights."""


@dataclass(frozen=True)
class Local:
    """One token on one host."""

    host: Host
    weights: float
    """Bytes of all weights."""
    host_bytes: float
    """Read from the host's memory for a token."""
    gpu_bytes: float
    """Read from the GPU's memory for a token."""
    gpu_weights: float
    """Bytes of the weights and cache that the GPU holds."""

    @property
    def fits(self) -> bool:
        """Whether the weights fit: what the GPU holds there, the rest in the host's memory."""
        on_gpu = self.gpu_weights <= self.host.gpu_memory
        return on_gpu and self.weights - self.gpu_weights <= self.host.memory

    @property
    def seconds(self) -> float:
        """At least, for a token: host and GPU take turns, since each layer needs the one before."""
        gpu = self.gpu_bytes / self.host.gpu_memory_bandwidth if self.gpu_bytes else 0.0
        return self.host_bytes / self.host.memory_bandwidth + gpu

    @property
    def tokens_per_second(self) -> float:
        """At most."""
        return 1.0 / self.seconds


def local(shape: ModelShape, host: Host, weight: float = FOUR_BITS, context: float = 0.0) -> Local:
    """A model with experts, `weight` bytes a weight, after `context` tokens (cache in BF16).

    With a GPU the routed experts stay in the host's memory and all else is on the GPU, as KTransformers
    splits it; without, everything is in the host's memory.
    """
    if not weight > 0 or not context >= 0:
        raise ConfigError(
            f"weight is {weight} and context {context}: they must be positive, context may be 0"
        )
    counted = parameters(shape)
    routed = counted.parts[Part.ROUTED].active * weight
    rest = counted.active * weight - routed
    cache = context * cache_bytes(shape)
    with_gpu = host.gpu_memory > 0
    held = (counted.total - counted.parts[Part.ROUTED].total - counted.parts[Part.EMBEDDING].total) * weight
    return Local(
        host=host,
        weights=counted.total * weight,
        host_bytes=routed if with_gpu else routed + rest + cache,
        gpu_bytes=rest + cache if with_gpu else 0.0,
        gpu_weights=held + cache if with_gpu else 0.0,
    )


def local_dense(elements: float, host: Host, weight: float = FOUR_BITS) -> Local:
    """A dense model of so many weights, all of which every token reads from the host's memory."""
    if not elements > 0 or not weight > 0:
        raise ConfigError(f"elements is {elements} and weight {weight}: both must be positive")
    size = elements * weight
    return Local(host=host, weights=size, host_bytes=size, gpu_bytes=0.0, gpu_weights=0.0)
