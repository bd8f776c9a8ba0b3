"""The limit that expert-parallel communication puts on decoding (ISCA §2.3.2).

Every layer, each GPU sends its tokens to their experts and gets the results back; with two micro-batches,
one computes while the other communicates, so at best a layer takes the communication of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.machines import Machine
from infra.cluster.serving.communication import MICRO_BATCHES, point_to_point
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.roofline import decode_step
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError

TOKENS = 32
"""Tokens of a GPU in one micro-batch, the paper's figure."""
DISPATCH, COMBINE = 1.0, 2.0
"""Bytes a value, FP8 and BF16, as the paper counts: without FP8's scales, which the rooflines carry."""
PAPER_HIDDEN = 7000
"""The paper rounds the hidden size, "7K", and its results follow from exactly this."""


@dataclass(frozen=True)
class DecodeLimit:
    """The theoretical limit: bytes over bandwidth, neither latency nor computation."""

    tokens: float
    experts: int
    """Experts that a token is sent to."""
    hidden: int
    layers: int
    bandwidth: float

    def __post_init__(self) -> None:
        for name in ("tokens", "experts", "hidden", "layers", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"decode limit: {name} is {getattr(self, name)}: it must be positive")

    @property
    def bytes(self) -> float:
        """Dispatched and combined by one GPU, for one micro-batch of one layer."""
        return (DISPATCH + COMBINE) * self.tokens * self.experts * self.hidden

    @property
    def communication(self) -> float:
        """Seconds of both all-to-alls of one micro-batch."""
        return self.bytes / self.bandwidth

    @property
    def layer(self) -> float:
        """Seconds of a layer: both micro-batches."""
        return MICRO_BATCHES * self.communication

    @property
    def tpot(self) -> float:
        """Seconds an output token."""
        return self.layers * self.layer

    @property
    def tokens_per_second(self) -> float:
        """Of one request."""
        return 1.0 / self.tpot


def decode_limit(
    shape: ModelShape, bandwidth: float, tokens: float = TOKENS, hidden: int | None = None
) -> DecodeLimit:
    """The paper's arithmetic: the shared expert counts as a routed one, and every layer as an MoE layer.

    `hidden` replaces the model's hidden size, for the paper's own rounding (`PAPER_HIDDEN`).
    """
    return DecodeLimit(
        tokens=tokens,
        experts=shape.num_experts_per_tok + shape.n_shared_experts,
        hidden=shape.hidden_size if hidden is None else hidden,
        layers=shape.num_hidden_layers,
        bandwidth=bandwidth,
    )


@dataclass(frozen=True)
class Beside:
    """What the limit leaves out, each by itself, in seconds an output token of both micro-batches."""

    bytes: float
    """Bytes over the bandwidth that the machine's links reach, MoE layers only, own tokens not sent."""
    latency: float
    """Of the messages: a dispatch and a combine for each MoE layer and micro-batch."""
    computation: float
    """Of the roofline, both micro-batches one after the other."""

    @property
    def communication(self) -> float:
        """Bytes and latency."""
        return self.bytes + self.latency

    @property
    def hidden(self) -> float:
        """A lower bound: the shorter of communication and computation hides behind the longer."""
        return max(self.communication, self.computation)

    @property
    def exposed(self) -> float:
        """An upper bound: nothing hides."""
        return self.communication + self.computation


def beside(
    shape: ModelShape, machine: Machine, deployment: Deployment, tokens: float, context: float
) -> Beside:
    """Latency and computation of a decode step of `tokens` a GPU and micro-batch on `machine`."""
    layers = MICRO_BATCHES * (shape.num_hidden_layers - shape.first_k_dense_replace)
    empty = point_to_point(shape, machine, deployment, 0.0)
    full = point_to_point(shape, machine, deployment, tokens)
    latency = empty.dispatch + empty.combine
    return Beside(
        bytes=layers * (full.dispatch + full.combine - latency),
        latency=layers * latency,
        computation=MICRO_BATCHES * decode_step(shape, machine, deployment, tokens, context).seconds,
    )
