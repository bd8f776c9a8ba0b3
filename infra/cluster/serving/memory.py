"""What a serving GPU holds: its weights, and the latent cache of the requests that it serves."""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.counts.accounting import cache_bytes, layer_parameters, parameters
from infra.cluster.counts.weights import Part
from infra.cluster.machines import Machine
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.kernels import BF16, FP8, linear_bytes
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError

RESERVE = 0.1
"""Part of the memory left to activations, buffers of the all-to-alls and the runtime: an assumption."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes of one GPU."""

    total: float
    weights: float
    reserve: float
    cache_per_request: float
    """Of a request of its own; a GPU of an attention group also holds those of the others."""

    @property
    def cache(self) -> float:
        """What is left for the cache; not positive where the weights do not fit."""
        return self.total - self.weights - self.reserve

    @property
    def requests(self) -> int:
        """Requests that each GPU can have of its own at once."""
        return max(0, int(self.cache // self.cache_per_request))


def weight_bytes(shape: ModelShape, deployment: Deployment, linear: float = FP8) -> float:
    """Bytes of the main model's weights on one GPU.

    Linear layers in `linear` bytes a value, FP8 by default; W_UK and W_UV (which decode absorbs), gate,
    embedding and head in BF16. Heads and vocabulary are split over an attention group, the down-projections
    are not.
    """
    deployment.check(shape)
    group, parts = deployment.tensor_parallel, parameters(shape).parts
    layer = layer_parameters(shape, 0)
    layers = shape.num_hidden_layers
    down = layers * sum(layer[f"self_attn.{name}"].total for name in ("q_a_proj", "kv_a_proj"))
    absorbed = layers * layer["self_attn.kv_b_proj"].total
    split = parts[Part.ATTENTION].total - down - absorbed
    sparse = layers - shape.first_k_dense_replace
    expert = parts[Part.ROUTED].total / max(1, sparse * shape.n_routed_experts)
    shared = 0 if deployment.shared_as_routed else parts[Part.SHARED].total
    in_linear = down + split / group + parts[Part.DENSE].total + shared
    in_linear += sparse * deployment.slots_per_gpu * expert
    in_bf16 = absorbed / group + parts[Part.ROUTER].total
    in_bf16 += (parts[Part.EMBEDDING].total + parts[Part.HEAD].total) / group
    return linear * in_linear + BF16 * in_bf16


def serving_memory(
    shape: ModelShape, machine: Machine, deployment: Deployment, context: float
) -> ServingMemory:
    """Memory of one GPU with requests of `context` tokens, their cache in BF16.

    Raises ConfigError where the weights leave no room for the cache of one request.
    """
    found = ServingMemory(
        total=machine.memory,
        weights=weight_bytes(shape, deployment, linear_bytes(machine)),
        reserve=RESERVE * machine.memory,
        cache_per_request=deployment.tensor_parallel * context * cache_bytes(shape),
    )
    if found.requests == 0:
        raise ConfigError(
            f"{deployment.name}: deployment.gpus is {deployment.gpus}: {found.weights / 1e9:.1f} GB of "
            f"weights leave a GPU of {found.total / 1e9:.0f} GB no room for a request of {context:.0f} "
            f"tokens ({found.cache_per_request / 1e9:.1f} GB): use more GPUs with fewer slots each"
        )
    return found
