"""A unit of GPUs that serves one model together: how attention and experts are spread over it (§3.4)."""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.shape import ModelShape
from infra.errors import ConfigError


@dataclass(frozen=True)
class Deployment:
    """Attention in groups of `tensor_parallel` GPUs, data parallel over the groups; experts over all GPUs.

    Inside a group tokens are split too (sequence parallelism), so that each GPU has its own tokens at the
    experts; the group's latent cache is on each of its GPUs, since all heads share it.
    """

    name: str
    gpus: int
    tensor_parallel: int
    slots_per_gpu: int
    """Expert weights that a GPU holds a layer, copies included."""
    shared_as_routed: bool = False
    """The shared expert has slots of its own and is reached like the others; else every GPU holds it."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tensor_parallel", "slots_per_gpu"):
            if getattr(self, name) < 1:
                raise ConfigError(f"deployment.{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def slots(self) -> int:
        """Expert slots of the unit, a layer."""
        return self.gpus * self.slots_per_gpu

    def copies(self, shape: ModelShape) -> int:
        """Experts that a token is sent to."""
        return shape.num_experts_per_tok + (shape.n_shared_experts if self.shared_as_routed else 0)

    def check(self, shape: ModelShape) -> None:
        """Raise ConfigError where the model does not fit the unit's groups, slots or heads."""
        group, heads = self.tensor_parallel, shape.num_attention_heads
        if self.gpus % group or heads % group:
            by = f"{self.gpus} GPUs" if self.gpus % group else f"{heads} heads"
            fits = max(n for n in range(1, group) if self.gpus % n == 0 and heads % n == 0)
            raise ConfigError(
                f"{self.name}: deployment.tensor_parallel is {group}, which does not divide the {by}; "
                f"{fits} does"
            )
        experts = shape.n_routed_experts + (shape.n_shared_experts if self.shared_as_routed else 0)
        if self.slots < experts:
            raise ConfigError(
                f"{self.name}: deployment.slots_per_gpu is {self.slots_per_gpu}: {self.gpus} GPUs have "
                f"{self.slots} slots for {experts} experts; {-(-experts // self.gpus)} would do"
            )

    def slots_read(self, shape: ModelShape, tokens: float) -> float:
        """Expected slots of one GPU that at least one token reaches in a step of `tokens` a GPU.

        Tokens choose independently and balanced, so a slot stays unread with (1 - copies / slots) to the
        power of all the unit's tokens. Without redundant copies this is exact for uniform routing, whatever
        the group limit.
        """
        missed = (1.0 - self.copies(shape) / self.slots) ** (tokens * self.gpus)
        return self.slots_per_gpu * (1.0 - missed)
