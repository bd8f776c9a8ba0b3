"""What is left of the network when planes of a multi-plane fat tree fail, or as much of a single plane.

In the multi-plane tree the network cards of one index in all nodes share a plane (ISCA'25 §5.1). When it
fails, the GPUs of that index hand their traffic over NVLink to GPUs of the planes that are left, and nothing
else notices. In a single-plane multi-rail tree the same loss is that of spine switches: every card stays
connected, every one a little slower, and a fault of the whole fabric is a fault of every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.machines import Machine
from infra.cluster.network.all_to_all import DISPATCH_BYTES, Reach, reach
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError


@dataclass(frozen=True)
class Degraded:
    """One all-to-all over a network of which a part has failed."""

    name: str
    failed: int
    """Parts that failed."""
    parts: int
    bandwidth: float
    """Network bytes a second that are left for a GPU, one direction, shared evenly within its node."""
    own_port: float
    """Share of the GPUs that still reach the network by their own port."""
    network_seconds: float
    """Of the busiest GPU."""
    nvlink_seconds: float
    """Of the busiest GPU, what it hands on for others included."""
    healthy_seconds: float

    @property
    def seconds(self) -> float:
        """Without latency: both links are pipelined."""
        return max(self.network_seconds, self.nvlink_seconds)

    @property
    def slow_down(self) -> float:
        """How many times as long as on the whole network."""
        return self.seconds / self.healthy_seconds


def lost_planes(
    shape: ModelShape,
    tokens: int,
    expert_parallel: int,
    machine: Machine,
    failed: int = 1,
    value_bytes: float = DISPATCH_BYTES,
    where: Reach | None = None,
) -> Degraded:
    """An all-to-all of `tokens` tokens a GPU when `failed` planes, of one for each GPU of a node, are out.

    The same holds for dispatch and, every direction turned round, for combine. The traffic of the failed
    planes is shared evenly by those left, each copy of a token handed over by itself; a token that arrives by
    another plane is forwarded from there. `where` says where experts lie by another rule than uniform
    routing, such as `gate_reach`. Raises ConfigError where no plane is left or the experts lie in one node.
    """
    where, token_bytes = _setting(shape, tokens, expert_parallel, machine, value_bytes, where)
    planes = where.gpus_per_node
    left = _left(failed, planes)
    outgoing = token_bytes * where.network_copies
    # What one GPU delivers to, and receives from, the other GPUs of its own node; and what it is sent by all
    # GPUs of other nodes together.
    local = token_bytes * (planes - 1) * where.gpu
    remote = token_bytes * (where.nodes - 1) * planes * where.gpu
    forwarded = remote * (planes - 1) / planes
    # Each arrival at a survivor is forwarded to all of its targets but the survivor itself. A GPU without a
    # plane receives everything over NVLink and hands on its own traffic; a survivor takes its share of that.
    sent = [local + forwarded * planes / left]
    received = [local + remote * (left - 1) / left + outgoing * failed / left]
    if failed:
        sent.append(local + outgoing)
        received.append(local + remote)
    return Degraded(
        name="multi-plane two-layer fat tree",
        failed=failed,
        parts=planes,
        bandwidth=machine.network * left / planes,
        own_port=left / planes,
        network_seconds=outgoing * planes / left / machine.network,
        nvlink_seconds=max(sent + received) / machine.nvlink,
        healthy_seconds=_healthy(where, token_bytes, machine),
    )


def lost_spines(
    shape: ModelShape,
    tokens: int,
    expert_parallel: int,
    machine: Machine,
    failed: int = 1,
    parts: int = 8,
    value_bytes: float = DISPATCH_BYTES,
    where: Reach | None = None,
) -> Degraded:
    """The same when a single-plane multi-rail tree has lost `failed` of `parts` equal parts of its spine.

    All traffic is taken to cross the spine, and routing to share what is left evenly.
    """
    where, token_bytes = _setting(shape, tokens, expert_parallel, machine, value_bytes, where)
    left = _left(failed, parts)
    bandwidth = machine.network * left / parts
    return Degraded(
        name="single-plane multi-rail fat tree",
        failed=failed,
        parts=parts,
        bandwidth=bandwidth,
        own_port=1.0,
        network_seconds=token_bytes * where.network_copies / bandwidth,
        nvlink_seconds=token_bytes * where.nvlink_copies / machine.nvlink,
        healthy_seconds=_healthy(where, token_bytes, machine),
    )


def _setting(
    shape: ModelShape,
    tokens: int,
    expert_parallel: int,
    machine: Machine,
    value_bytes: float,
    where: Reach | None,
) -> tuple[Reach, float]:
    """Where tokens go, and the bytes of a GPU's tokens."""
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}: a GPU must hold at least 1")
    if where is None:
        where = reach(shape, expert_parallel, machine.gpus_per_node)
    if where.nodes == 1:
        raise ConfigError(
            f"expert_parallel is {expert_parallel}: within one node of {machine.gpus_per_node} GPUs no token "
            f"crosses the network; {2 * machine.gpus_per_node} does"
        )
    return where, tokens * shape.hidden_size * value_bytes


def _left(failed: int, parts: int) -> int:
    if not 0 <= failed < parts:
        raise ConfigError(f"failed is {failed} of {parts}: at least one must be left, so 0 to {parts - 1}")
    return parts - failed


def _healthy(where: Reach, token_bytes: float, machine: Machine) -> float:
    return token_bytes * max(where.network_copies / machine.network, where.nvlink_copies / machine.nvlink)
