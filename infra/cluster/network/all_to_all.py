"""What dispatch and combine of the experts cost under node-limited routing (report §2.1.2, §3.2.2).

A token goes once over the network to each node that holds one of its experts, to the GPU of the sender's
own index there, which forwards it over NVLink to each GPU that holds one. Combine is the same way back: a
node's results are added up before they cross the network. Both links work at the same time, so the slower one
decides.

Routing is taken as uniform: the expert groups that a token may use are drawn at random, then its experts
among theirs, without replacement. That makes the expected numbers of nodes and GPUs exact. A real gate picks
the groups by their best two scores, so it uses nearly all of them: of the four nodes that DeepSeek-V3 allows
a token reaches 3.63 here and 3.95 by the gate's rule on independent scores: 9 % more network traffic.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import comb, isfinite

from infra.cluster.machines import Machine
from infra.cluster.network.even_split import even_split
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError

DISPATCH_BYTES = 1 + 4 / 128
"""Bytes a value: FP8, and a four-byte scale for every 128 (report §3.3.2)."""
COMBINE_BYTES = 2.0
"""Bytes a value: BF16, forward and backward (report §3.3.3)."""


def value_bytes(precision: str) -> tuple[float, float]:
    """Bytes a value of dispatch and of combine, where the products are `fp8`, `bf16` or `fp32`."""
    combine = 4.0 if precision == "fp32" else COMBINE_BYTES
    return (DISPATCH_BYTES if precision == "fp8" else combine), combine


@dataclass(frozen=True)
class Reach:
    """Where the experts of one token lie, in expectation."""

    nodes: int
    """Nodes over which the experts are spread."""
    gpus_per_node: int
    """GPUs of one node that hold these experts."""
    node: float
    """Probability that a token has an expert on a given node."""
    gpu: float
    """Probability that a token has an expert on a given GPU."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 1:
            raise ConfigError(
                f"reach has {self.nodes} nodes of {self.gpus_per_node} GPUs: both must be at least 1"
            )
        if not 0 <= self.gpu <= self.node <= 1:
            raise ConfigError(
                f"reach.node is {self.node} and reach.gpu {self.gpu}: probabilities between 0 and 1, and a "
                "GPU is reached at most as often as its node"
            )

    @property
    def nodes_reached(self) -> float:
        """Different nodes that hold experts of a token, its own among them."""
        return self.nodes * self.node

    @property
    def gpus_reached(self) -> float:
        """Different GPUs that hold experts of a token, its own among them."""
        return self.nodes * self.gpus_per_node * self.gpu

    @property
    def network_copies(self) -> float:
        """Times a token crosses the network: its own node costs nothing."""
        return (self.nodes - 1) * self.node

    @property
    def nvlink_copies(self) -> float:
        """Times a token crosses NVLink: in each node every GPU but that where it starts or arrives."""
        return self.nodes * (self.gpus_per_node - 1) * self.gpu


@dataclass(frozen=True)
class Exchange:
    """One all-to-all. Bytes are what each GPU sends, which in expectation is what it receives."""

    network_bytes: float
    nvlink_bytes: float
    network_seconds: float
    nvlink_seconds: float
    latency: float
    """Seconds until the first byte arrives."""

    @property
    def seconds(self) -> float:
        """Both links are pipelined: the slower one, and the latency once."""
        return max(self.network_seconds, self.nvlink_seconds) + self.latency

    @property
    def bound_by(self) -> str:
        """The link that decides: "network" or "nvlink"."""
        return "network" if self.network_seconds >= self.nvlink_seconds else "nvlink"


@dataclass(frozen=True)
class AllToAll:
    """Dispatch and combine of one layer's experts, for the tokens of one GPU."""

    tokens: int
    reach: Reach
    dispatch: Exchange
    combine: Exchange

    @property
    def forward_seconds(self) -> float:
        return self.dispatch.seconds + self.combine.seconds

    @property
    def backward_seconds(self) -> float:
        """Combine's gradient is dispatched in FP8 and dispatch's gradient combined in BF16 (report §3.3.3):
        the same bytes again."""
        return self.dispatch.seconds + self.combine.seconds

    @property
    def network_bytes(self) -> float:
        """Bytes each GPU sends over the network, forward and backward together."""
        return 2 * (self.dispatch.network_bytes + self.combine.network_bytes)

    @property
    def nvlink_bytes(self) -> float:
        """Bytes each GPU sends over NVLink, forward and backward together."""
        return 2 * (self.dispatch.nvlink_bytes + self.combine.nvlink_bytes)


def all_to_all(
    shape: ModelShape,
    tokens: int,
    expert_parallel: int,
    machine: Machine,
    dispatch_bytes: float = DISPATCH_BYTES,
    combine_bytes: float = COMBINE_BYTES,
    node_limited: bool = True,
    where: Reach | None = None,
) -> AllToAll:
    """Cost of one MoE layer's dispatch and combine, for `tokens` tokens on each GPU.

    `expert_parallel` GPUs share the routed experts; up to `machine.gpus_per_node` of them lie in one node
    (`even_split`).
    `dispatch_bytes` and `combine_bytes` are bytes a value. The tokens' expert indices and weights are left
    out: 64 bytes beside 7392. Without `node_limited` any experts may be picked, for comparison.
    `where` says where experts lie by another rule than uniform routing, such as `gate_reach`.

    Raises ConfigError where the GPUs do not divide the experts.
    """
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}: a GPU must hold at least 1")
    for name, value in (("dispatch_bytes", dispatch_bytes), ("combine_bytes", combine_bytes)):
        if not (isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value}: it must be positive, 1 for FP8 or 2 for BF16")
    if where is None:
        where = reach(shape, expert_parallel, machine.gpus_per_node, node_limited)
    values = tokens * shape.hidden_size
    return AllToAll(
        tokens=tokens,
        reach=where,
        dispatch=_exchange(where, values * dispatch_bytes, machine),
        combine=_exchange(where, values * combine_bytes, machine),
    )


def reach(shape: ModelShape, expert_parallel: int, gpus_per_node: int, node_limited: bool = True) -> Reach:
    """Expected nodes and GPUs of a token's experts, exact for uniform routing.

    Experts lie in equal, consecutive runs on the GPUs, and these in equal parts on as few nodes as can hold
    them (`even_split`). Groups are those of the gate (`n_group`), usually one a node; a node may also hold
    several or a part of one, and then a token kept to `topk_group` groups reaches more nodes than that.
    Raises ConfigError where the GPUs do not divide the experts.
    """
    experts = shape.n_routed_experts
    if expert_parallel < 1 or experts % expert_parallel:
        raise ConfigError(
            f"expert_parallel is {expert_parallel}, which does not divide n_routed_experts ({experts}): "
            f"{_nearest(expert_parallel, experts)} fits"
        )
    nodes, in_node = even_split(expert_parallel, gpus_per_node)
    return Reach(
        nodes=nodes,
        gpus_per_node=in_node,
        node=_reached(shape, nodes, node_limited),
        gpu=_reached(shape, expert_parallel, node_limited),
    )


def experts_at_no_cost(shape: ModelShape, machine: Machine) -> float:
    """Experts a token could have, each on its own GPU, before NVLink takes longer than the network.

    In the time of one copy over the network, NVLink makes nvlink / network of them in each of the
    `topk_group` nodes. The published 3.2 experts a node, 13 in four, are those of 160 over 50 GB/s (report
    §3.2.2); at the 40 GB/s that an H800's port really sends (ISCA'25 §4) it is 4 a node, 16 in four.
    """
    return shape.topk_group * machine.nvlink / machine.network


def _reached(shape: ModelShape, parts: int, node_limited: bool) -> float:
    """Probability that a token has an expert in a given one of `parts` equal runs, mean over the runs."""
    experts, picked = shape.n_routed_experts, shape.num_experts_per_tok
    groups, chosen = shape.n_group, shape.topk_group
    if not node_limited or groups == chosen:
        groups = chosen = 1
    size, held = experts // groups, experts // parts
    missed = 0
    for run, times in Counter(_overlaps(part * held, held, size) for part in range(parts)).items():
        # Of the groups that hold the run: ways to have chosen so many of them, and with them so many experts.
        ways = Counter({(0, 0): 1})
        for inside in run:
            ways += Counter({(n + 1, own + inside): count for (n, own), count in ways.items()})
        missed += times * sum(
            count * comb(groups - len(run), chosen - n) * comb(chosen * size - own, picked)
            for (n, own), count in ways.items()
            if n <= chosen
        )
    return 1.0 - missed / (parts * comb(groups, chosen) * comb(chosen * size, picked))


def _overlaps(start: int, held: int, size: int) -> tuple[int, ...]:
    """Experts that the run of `held` from `start` has in each group of `size` that it touches."""
    end = start + held
    touched = range(start // size, (end - 1) // size + 1)
    return tuple(sorted(min(end, (group + 1) * size) - max(start, group * size) for group in touched))


def _exchange(where: Reach, token_bytes: float, machine: Machine) -> Exchange:
    """One all-to-all in which the tokens of a GPU are `token_bytes` together."""
    network_bytes = token_bytes * where.network_copies
    nvlink_bytes = token_bytes * where.nvlink_copies
    return Exchange(
        network_bytes=network_bytes,
        nvlink_bytes=nvlink_bytes,
        network_seconds=network_bytes / machine.network,
        nvlink_seconds=nvlink_bytes / machine.nvlink,
        latency=(machine.network_latency if where.nodes > 1 else 0.0)
        + (machine.nvlink_latency if where.gpus_per_node > 1 else 0.0),
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest(wanted: int, number: int) -> int:
    """The divisor of `number` that is nearest to `wanted`."""
    return min(_divisors(number), key=lambda d: abs(d - wanted))
