"""Seconds of the all-to-alls of an MoE layer, and of the exchange inside an attention group.

Two ways to reach experts, as the report serves (§3.4): decode sends each copy of a token straight to its
expert's GPU over the network; prefill sends it once to each node, where NVLink carries it on.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.machines import Machine
from infra.cluster.network.all_to_all import value_bytes
from infra.cluster.network.gate_reach import gate_reach
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.kernels import BF16
from infra.cluster.shape import ModelShape

MICRO_BATCHES = 2
"""That take turns, so that one communicates while the other computes."""


@dataclass(frozen=True)
class AllToAll:
    """Seconds of the two halves, for one layer and one micro-batch."""

    dispatch: float
    combine: float


def one_domain(machine: Machine, deployment: Deployment) -> bool:
    """Whether NVLink alone joins the whole unit."""
    return deployment.gpus <= machine.gpus_per_node


def point_to_point(
    shape: ModelShape, machine: Machine, deployment: Deployment, tokens: float, imbalance: float = 1.0
) -> AllToAll:
    """Each copy of a GPU's `tokens` goes straight to the GPU of its expert; its own share stays."""
    if deployment.gpus == 1:
        return AllToAll(0.0, 0.0)
    inside = one_domain(machine, deployment)
    bandwidth = machine.nvlink if inside else machine.network
    latency = machine.nvlink_latency if inside else machine.network_latency
    away = (deployment.gpus - 1) / deployment.gpus
    values = tokens * deployment.copies(shape) * shape.hidden_size * away * imbalance
    return _both(machine, latency, values / bandwidth)


def node_limited(
    shape: ModelShape, machine: Machine, deployment: Deployment, tokens: float, imbalance: float = 1.0
) -> AllToAll:
    """A token crosses the network once for each other node it reaches; NVLink spreads its copies there.

    Which nodes and GPUs it reaches is counted as for training (`gate_reach`), with the experts of a group
    kept together as hierarchical placement keeps them; a shared expert that has slots of its own is taken to
    have one in the token's node. Both links run at once, so the slower one counts (report §3.2.2).
    """
    if one_domain(machine, deployment):
        return point_to_point(shape, machine, deployment, tokens, imbalance)
    where = gate_reach(shape, deployment.gpus, machine.gpus_per_node)
    values = tokens * shape.hidden_size * imbalance
    shared = deployment.copies(shape) - shape.num_experts_per_tok
    away = (where.gpus_per_node - 1) / where.gpus_per_node
    network = values * where.network_copies / machine.network
    nvlink = values * (where.nvlink_copies + shared * away) / machine.nvlink
    return _both(machine, machine.network_latency + machine.nvlink_latency, max(network, nvlink))


def _both(machine: Machine, latency: float, seconds: float) -> AllToAll:
    """Dispatch and combine from the `seconds` that one byte a value takes: in the formats of training, with
    the scales of FP8 (report §3.3.2), and in BF16 on a GPU without FP8."""
    dispatch, combine = value_bytes("fp8" if machine.fp8 else "bf16")
    return AllToAll(latency + seconds * dispatch, latency + seconds * combine)


def attention_group(shape: ModelShape, machine: Machine, deployment: Deployment, tokens: float) -> float:
    """Seconds a layer that tensor-parallel attention exchanges over NVLink, for a GPU's own `tokens`.

    The latents (queries and keys/values) are gathered, the partial outputs are scattered and added, in BF16.
    """
    group = deployment.tensor_parallel
    if group == 1:
        return 0.0
    latents = shape.q_lora_rank + shape.kv_lora_rank + shape.qk_rope_head_dim
    values = tokens * (group - 1) * (latents + shape.hidden_size)
    return 2 * machine.nvlink_latency + values * BF16 / machine.nvlink
