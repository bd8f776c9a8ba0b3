"""Seconds of the transfers beside all-to-all: between pipeline stages, and of ZeRO-1 between replicas.

Rings: of r ranks each sends (r - 1)/r of the whole, in r - 1 steps. Over several nodes the ranks of one index
form a ring over the network, all indices at once, each by its own port, and the ranks of a node one over
NVLink. The two phases are counted one after the other, which is the upper bound: they can be pipelined.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from infra.cluster.machines import Machine
from infra.cluster.network.even_split import even_split
from infra.errors import ConfigError

BF16_BYTES = 2.0
FP32_BYTES = 4.0


@dataclass(frozen=True)
class Group:
    """Ranks that hold the same parameters: `nodes` nodes, `in_node` ranks in each."""

    nodes: int
    in_node: int

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.in_node < 1:
            raise ConfigError(f"group of {self.nodes} nodes x {self.in_node} ranks: both must be at least 1")

    @property
    def ranks(self) -> int:
        return self.nodes * self.in_node


@dataclass(frozen=True)
class Transfer:
    """Bytes that each GPU sends over each link, and the seconds of both phases with their latencies."""

    network_bytes: float
    nvlink_bytes: float
    network_seconds: float
    nvlink_seconds: float

    @property
    def seconds(self) -> float:
        return self.network_seconds + self.nvlink_seconds


def boundary(
    tokens: int,
    hidden_size: int,
    machine: Machine,
    value_bytes: float = BF16_BYTES,
    within_node: bool = False,
) -> Transfer:
    """One micro-batch's activations (or their gradients) sent by a pipeline stage to the next.

    tokens x hidden_size values on each GPU, over the network unless both stages lie `within_node`.
    """
    if min(tokens, hidden_size) < 1:
        raise ConfigError(f"boundary of {tokens} tokens x {hidden_size} values: both must be at least 1")
    sent = _positive("value_bytes", value_bytes) * tokens * hidden_size
    if within_node:
        return Transfer(0.0, sent, 0.0, sent / machine.nvlink + machine.nvlink_latency)
    return Transfer(sent, 0.0, sent / machine.network + machine.network_latency, 0.0)


def all_gather(total_bytes: float, group: Group, machine: Machine) -> Transfer:
    """Every rank has 1/ranks of `total_bytes` and shall have all of it.

    First each index's ring over the nodes, which gathers nodes/ranks of the whole, then the node's ring.
    """
    if not (isfinite(total_bytes) and total_bytes >= 0):
        raise ConfigError(f"total_bytes is {total_bytes}: it must be 0 or more")
    if group.in_node > machine.gpus_per_node:
        raise ConfigError(
            f"group has {group.in_node} ranks in a node, but {machine.name} has {machine.gpus_per_node} GPUs "
            f"there: {machine.gpus_per_node} fits"
        )
    network = total_bytes * (group.nodes - 1) / group.ranks
    nvlink = total_bytes * (group.in_node - 1) / group.in_node
    return Transfer(
        network,
        nvlink,
        network / machine.network + (group.nodes - 1) * machine.network_latency,
        nvlink / machine.nvlink + (group.in_node - 1) * machine.nvlink_latency,
    )


def reduce_scatter(total_bytes: float, group: Group, machine: Machine) -> Transfer:
    """Every rank has `total_bytes` of addends and shall have 1/ranks of the sum: all-gather backwards."""
    return all_gather(total_bytes, group, machine)


@dataclass(frozen=True)
class Replicas:
    """ZeRO-1 of parameters that a group holds alike: gradients to their owner, new parameters back."""

    group: Group
    parameters: int
    """Of one rank."""
    gradients: Transfer
    gather: Transfer

    @property
    def seconds(self) -> float:
        return self.gradients.seconds + self.gather.seconds


@dataclass(frozen=True)
class Zero1:
    """ZeRO-1 of one pipeline stage: the dense part over all GPUs, experts over those that hold the same."""

    dense: Replicas
    experts: Replicas

    @property
    def seconds(self) -> float:
        """One after the other: both use the same ports."""
        return self.dense.seconds + self.experts.seconds


def zero1(
    dense_parameters: int,
    expert_parameters: int,
    data_parallel: int,
    expert_parallel: int,
    machine: Machine,
    gradient_bytes: float = FP32_BYTES,
    parameter_bytes: float = BF16_BYTES,
) -> Zero1:
    """Seconds of ZeRO-1's communication in one step, none of it hidden.

    `dense_parameters` and `expert_parameters` are those on one GPU. `data_parallel` GPUs of a pipeline stage
    see different tokens; each `expert_parallel` of them, consecutive, hold all experts once (report §3.2).
    Ranks lie in equal parts on as few nodes as can hold them (`even_split`), and so do the copies of the
    experts; a group that does not fill its nodes crosses the network for the part that lies on others.
    The report publishes neither the type of the gradients sent (it accumulates them in FP32, §3.3.2) nor that
    of the parameters gathered: both are arguments.

    Raises ConfigError where `data_parallel` is no multiple of `expert_parallel`.
    """
    if min(data_parallel, expert_parallel) < 1 or data_parallel % expert_parallel:
        raise ConfigError(
            f"data_parallel ({data_parallel}) is no multiple of expert_parallel ({expert_parallel}): "
            f"{max(1, round(data_parallel / max(1, expert_parallel))) * max(1, expert_parallel)} fits"
        )
    gpus = machine.gpus_per_node
    dense = Group(*even_split(data_parallel, gpus))
    experts = Group(*even_split(data_parallel // expert_parallel, max(1, gpus // expert_parallel)))
    _positive("gradient_bytes", gradient_bytes)
    _positive("parameter_bytes", parameter_bytes)

    def replicas(group: Group, parameters: int) -> Replicas:
        return Replicas(
            group,
            parameters,
            gradients=reduce_scatter(parameters * gradient_bytes, group, machine),
            gather=all_gather(parameters * parameter_bytes, group, machine),
        )

    return Zero1(replicas(dense, dense_parameters), replicas(experts, expert_parameters))


def _positive(name: str, value: float) -> float:
    if not (isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}: it must be positive")
    return value
