"""Two micro-batches in turn: the all-to-all of one hides behind the computation of the other (report §3.4).

Replayed event by event: computation and network each do one thing at a time, in an order that is fixed
beforehand, and a phase starts when its resource and the micro-batch's phase before are done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from infra.cluster.machines import Machine
from infra.cluster.serving.communication import (
    MICRO_BATCHES,
    AllToAll,
    attention_group,
    node_limited,
    point_to_point,
)
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.roofline import Roofline, decode_step, prefill_step
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError, nearest


@dataclass(frozen=True)
class Phases:
    """Seconds of what one micro-batch does in one MoE layer, and around the MoE layers."""

    attention: float
    dispatch: float
    experts: float
    combine: float
    dense: float = 0.0
    """Attention and network of one dense layer."""
    head: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ConfigError(f"phases.{name} is {value} seconds: it must not be negative")

    def computation(self, dense: int, sparse: int) -> float:
        """Seconds of all layers and the head that are not communication."""
        return dense * self.dense + sparse * (self.attention + self.experts) + self.head

    def communication(self, sparse: int) -> float:
        """Seconds of all all-to-alls."""
        return sparse * (self.dispatch + self.combine)


@dataclass(frozen=True)
class Overlap:
    """One step in seconds: in two micro-batches that overlap, and as one batch without."""

    overlapped: float
    order: str
    """The better one of `ORDERS`."""
    alone: float
    """The whole batch in one piece, nothing hidden; its weights are read once and not twice."""
    computation: float
    """Of both micro-batches; the step is at least this."""
    communication: float
    """Of both micro-batches; the step is at least this."""
    tokens: float
    """Of one GPU, both micro-batches."""

    @property
    def bound(self) -> str:
        """Which side the overlapped step waits for."""
        return "communication" if self.communication > self.computation else "computation"

    @property
    def gain(self) -> float:
        """Speed with overlap over speed without; below 1 where reading the weights twice costs more."""
        return self.alone / self.overlapped

    @property
    def best(self) -> float:
        """Seconds of the better of the two."""
        return min(self.overlapped, self.alone)

    @property
    def hidden(self) -> float:
        """Part of the shorter side that hides behind the longer, 0 to 1."""
        shorter = min(self.computation, self.communication)
        return 1.0 if shorter == 0 else (self.computation + self.communication - self.overlapped) / shorter


Step = tuple[int, str, float]
"""Which micro-batch, on which resource, for how many seconds."""


def alternating(phases: Phases, sparse: int) -> Iterator[Step]:
    """Both micro-batches go through each phase of a layer, one after the other."""
    for _ in range(sparse):
        for resource, seconds in (
            ("computation", phases.attention),
            ("network", phases.dispatch),
            ("computation", phases.experts),
            ("network", phases.combine),
        ):
            for batch in range(MICRO_BATCHES):
                yield batch, resource, seconds


def attention_in_two(phases: Phases, sparse: int) -> Iterator[Step]:
    """One micro-batch's attention takes as long as the other's dispatch, experts and combine: the experts
    come between two parts of the attention, which are as long to each other as the all-to-alls that they
    hide. The order of the five-stage pipeline that decode runs in production.
    """
    sent = phases.dispatch + phases.combine
    first = phases.attention * (phases.dispatch / sent if sent else 0.5)
    for turn in range(MICRO_BATCHES * sparse):
        lead, other = turn % 2, 1 - turn % 2
        yield lead, "computation", first
        if turn:
            yield other, "computation", phases.experts
            yield other, "network", phases.combine
        yield lead, "computation", phases.attention - first
        yield lead, "network", phases.dispatch
    if sparse:
        yield lead, "computation", phases.experts
        yield lead, "network", phases.combine


ORDERS = {"alternating": alternating, "attention in two": attention_in_two}


def replay(phases: Phases, dense: int, sparse: int, order: str) -> float:
    """Seconds until both micro-batches are through `dense` dense and `sparse` MoE layers and the head."""
    if order not in ORDERS:
        raise ConfigError(f"order {order!r} is unknown: {nearest(order, ORDERS)}")
    both = range(MICRO_BATCHES)
    steps = [(batch, "computation", dense * phases.dense) for batch in both]
    steps += ORDERS[order](phases, sparse)
    steps += [(batch, "computation", phases.head) for batch in both]
    free = {"computation": 0.0, "network": 0.0}
    done = [0.0] * MICRO_BATCHES
    for batch, resource, seconds in steps:
        done[batch] = free[resource] = max(free[resource], done[batch]) + seconds
    return max(done)


def overlap_decode(
    shape: ModelShape,
    machine: Machine,
    deployment: Deployment,
    requests: float,
    context: float,
    queries: int = 1,
    imbalance: float = 1.0,
) -> Overlap:
    """A decode step of `requests` a GPU, in two halves or in one piece; the all-to-all holds no
    multiprocessors (ISCA §4.4.1). `overlapped` is the TPOT.
    """

    def half(share: float) -> Phases:
        step = decode_step(shape, machine, deployment, share * requests, context, queries, imbalance)
        sent = point_to_point(shape, machine, deployment, step.tokens, imbalance)
        return _phases(step, sent, attention_group(shape, machine, deployment, step.tokens))

    return _overlap(shape, half(1 / MICRO_BATCHES), half(1.0), requests * queries)


def overlap_prefill(
    shape: ModelShape,
    machine: Machine,
    deployment: Deployment,
    tokens: float,
    prompt: float,
    cached: float = 0.0,
    imbalance: float = 1.0,
) -> Overlap:
    """A prefill step of `tokens` a GPU, in two halves of like load or in one piece."""

    def half(share: float) -> Phases:
        step = prefill_step(shape, machine, deployment, share * tokens, prompt, cached, imbalance)
        sent = node_limited(shape, machine, deployment, step.tokens, imbalance)
        return _phases(step, sent, attention_group(shape, machine, deployment, step.tokens))

    return _overlap(shape, half(1 / MICRO_BATCHES), half(1.0), tokens)


def _phases(step: Roofline, sent: AllToAll, exchange: float) -> Phases:
    attention = step.layer("attention") + exchange
    return Phases(
        attention=attention,
        dispatch=sent.dispatch,
        experts=step.layer("experts"),
        combine=sent.combine,
        dense=attention + step.layer("dense"),
        head=step.layer("head"),
    )


def _overlap(shape: ModelShape, half: Phases, whole: Phases, tokens: float) -> Overlap:
    dense = shape.first_k_dense_replace
    sparse = shape.num_hidden_layers - dense
    times = {order: replay(half, dense, sparse, order) for order in ORDERS}
    order = min(times, key=times.__getitem__)
    return Overlap(
        overlapped=times[order],
        order=order,
        alone=whole.computation(dense, sparse) + whole.communication(sparse),
        computation=MICRO_BATCHES * half.computation(dense, sparse),
        communication=MICRO_BATCHES * half.communication(sparse),
        tokens=tokens,
    )
