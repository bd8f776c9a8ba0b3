"""The roofline of a step on one GPU: each kernel bound by memory or by products, and their sum.

What a step takes without communication; `overlap` adds that.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.machines import Machine
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.kernels import Gpu, Kernel
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError


@dataclass(frozen=True)
class Roofline:
    """The kernels that one GPU runs in a step."""

    kernels: tuple[Kernel, ...]
    tokens: float
    """Tokens of one GPU that the step takes."""

    @property
    def seconds(self) -> float:
        """The step, all layers, without communication."""
        return sum(one.layers * one.seconds for one in self.kernels)

    def layer(self, part: str) -> float:
        """Seconds of one layer's `attention`, `dense` or `experts`, or of the `head`."""
        return sum(one.seconds for one in self.kernels if one.part == part)

    def share(self, bound: str) -> float:
        """Part of the time that is bound by `memory` or by `products`, 0 to 1."""
        found = sum(one.layers * one.seconds for one in self.kernels if one.bound == bound)
        return found / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / self.seconds


def decode_step(
    shape: ModelShape,
    machine: Machine,
    deployment: Deployment,
    requests: float,
    context: float,
    queries: int = 1,
    imbalance: float = 1.0,
) -> Roofline:
    """One decode step: `requests` of one GPU at `context` tokens each, `queries` new tokens a request.

    `queries` above one verifies drafts. `imbalance` is the busiest GPU's tokens at the experts over the mean.
    Raises ConfigError where a number is not positive or the model does not fit the deployment.
    """
    deployment.check(shape)
    _positive(requests=requests, context=context, queries=queries, imbalance=imbalance)
    gpu = Gpu(shape, machine, deployment, imbalance=imbalance)
    tokens = requests * queries
    sparse = shape.num_hidden_layers - shape.first_k_dense_replace
    return Roofline(
        (
            *gpu.decode_attention(requests, queries, context, shape.num_hidden_layers),
            *gpu.dense(tokens, shape.first_k_dense_replace),
            *gpu.experts(tokens, sparse),
            *gpu.head(tokens),
        ),
        tokens,
    )


def draft_step(
    shape: ModelShape,
    machine: Machine,
    deployment: Deployment,
    requests: float,
    context: float,
    queries: int = 1,
    imbalance: float = 1.0,
) -> Roofline:
    """One run of an MTP module: its projection [2 hidden, hidden], one MoE layer, the output head (§2.2)."""
    deployment.check(shape)
    _positive(requests=requests, context=context, queries=queries, imbalance=imbalance)
    gpu = Gpu(shape, machine, deployment, imbalance=imbalance)
    tokens, hidden = requests * queries, shape.hidden_size
    return Roofline(
        (
            gpu.matmul("MTP projection", "head", tokens, 2 * hidden, hidden, 1),
            *gpu.decode_attention(requests, queries, context, 1),
            *gpu.experts(tokens, 1),
            # Only the last token of a request is drafted from.
            *gpu.head(requests),
        ),
        tokens,
    )


def prefill_step(
    shape: ModelShape,
    machine: Machine,
    deployment: Deployment,
    tokens: float,
    prompt: float,
    cached: float = 0.0,
    imbalance: float = 1.0,
) -> Roofline:
    """One prefill step: `tokens` new tokens of one GPU, from prompts of `prompt` tokens.

    The first `cached` tokens of each prompt are not computed but attended to. All-to-all kernels hold
    `machine.communication_sms` meanwhile. The head runs on the last token of each prompt.
    """
    deployment.check(shape)
    _positive(tokens=tokens, prompt=prompt, imbalance=imbalance)
    if not 0 <= cached < prompt:
        raise ConfigError(f"cached is {cached}: it must be at least 0 and less than the prompt, {prompt}")
    lent = machine.communication_sms / machine.multiprocessors
    gpu = Gpu(shape, machine, deployment, lent=lent, imbalance=imbalance)
    sparse = shape.num_hidden_layers - shape.first_k_dense_replace
    return Roofline(
        (
            *gpu.prefill_attention(tokens, cached + (prompt - cached + 1) / 2.0, shape.num_hidden_layers),
            *gpu.dense(tokens, shape.first_k_dense_replace),
            *gpu.experts(tokens, sparse),
            *gpu.head(tokens / (prompt - cached)),
        ),
        tokens,
    )


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name} is {value}: it must be positive")
