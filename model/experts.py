"""The routed experts of a layer as one grouped product: no token is dropped.

Tokens arrive sorted by expert; each expert's rows are one contiguous slice. The backward pass is written by
hand: it recomputes the activation from the saved gate and up values, and writes each expert's weight gradient
straight into its slice. A row's routing weight goes onto its hidden values, which are fewer than its outputs.
Under `fp8` all of that is `kernels.layers.mlp`.
Legend: P (token, expert) pairs, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.ffn import swiglu_backward
from model.precision import Precision

if TYPE_CHECKING:
    from kernels.layers.activation import FP8Activation


class _GroupedSwiGLU(torch.autograd.Function):
    """Products in the type of `x_PD`, whatever the weights are stored in; their gradients have their type."""

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, gate_up: Tensor, down: Tensor, weights_P1: Tensor | None, counts: list[int]
    ) -> Tensor:
        both = _product(x_PD, gate_up.to(x_PD.dtype).mT, counts)
        gate, up = both.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up)
        if weights_P1 is not None:
            hidden.mul_(weights_P1)
        ctx.counts = counts
        ctx.save_for_backward(x_PD, gate_up, down, weights_P1, both)
        return _product(hidden, down.to(x_PD.dtype).mT, counts)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        x_PD, gate_up, down, weights_P1, both = ctx.saved_tensors
        counts = ctx.counts
        grad_PD = grad_PD.contiguous()
        gate, up = both.chunk(2, dim=-1)
        opened = F.silu(gate)
        hidden = opened * up
        grad_hidden = _product(grad_PD, down.to(x_PD.dtype), counts)
        grad_weights = None
        if weights_P1 is not None:
            grad_weights = (grad_hidden * hidden).sum(-1, keepdim=True)
            grad_hidden.mul_(weights_P1)
            hidden.mul_(weights_P1)
        grad_down = _outer(grad_PD, hidden, counts, down)
        grad_both = swiglu_backward(grad_hidden, both, opened)
        grad_x = _product(grad_both, gate_up.to(x_PD.dtype), counts)
        return grad_x, _outer(grad_both, x_PD, counts, gate_up), grad_down, grad_weights, None


def _product(x_PI: Tensor, weights_EIO: Tensor, counts: list[int]) -> Tensor:
    """Each expert's rows times its matrix."""
    y_PO = x_PI.new_empty(x_PI.shape[0], weights_EIO.shape[2])
    for x, w, out in zip(x_PI.split(counts), weights_EIO, y_PO.split(counts), strict=True):
        if len(x):
            torch.mm(x, w, out=out)
    return y_PO


def _outer(left_PO: Tensor, right_PI: Tensor, counts: list[int], like: Tensor) -> Tensor:
    """Gradient of every expert's matrix [O, I], in the type of the weights `like`; zero without a row."""
    grads = torch.empty_like(like, dtype=left_PO.dtype)
    for left, right, out in zip(left_PO.split(counts), right_PI.split(counts), grads, strict=True):
        if len(left):
            torch.mm(left.t(), right, out=out)
        else:
            out.zero_()
    return grads.to(like.dtype)


class RoutedExperts(nn.Module):
    """Weights of all experts of a layer: gate and up [E, 2F, D] (gate rows first), down [E, D, F]."""

    def __init__(self, experts: int, hidden: int, width: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def block(self, rows: int) -> int:
        """What `counts` should be multiples of when there are `rows` rows in all.

        On a CPU, oneDNN compiles code for every new shape of a bfloat16 product, which takes ten times as
        long as the product. Rounded up to a sixteenth of the mean, counts are the same few numbers in every
        step.
        """
        mean = rows // self.gate_up_proj.shape[0]
        compiled = self.precision.name == "bf16" and self.gate_up_proj.device.type == "cpu"
        return 1 << (mean // 16).bit_length() - 1 if compiled and mean >= 16 else 1

    def forward(
        self, x_PD: Tensor | FP8Activation, counts: list[int] | Tensor, weights_P1: Tensor | None = None
    ) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> the experts' outputs, same order, each
        times its weight if weights are given. Under `fp8` counts may be a tensor, which stays on its device.
        """
        if self.precision.fp8:
            counts = torch.as_tensor(counts, device=x_PD.device)
            offsets = F.pad(counts.cumsum(0), (1, 0))
            weights = None if weights_P1 is None else weights_P1.squeeze(1)
            return self.precision.fp8_experts(x_PD, self.gate_up_proj, self.down_proj, offsets, weights)
        kind = x_PD.dtype if self.precision.name == "fp32" else torch.bfloat16
        weights = None if weights_P1 is None else weights_P1.to(kind)
        y_PD = _GroupedSwiGLU.apply(x_PD.to(kind), self.gate_up_proj, self.down_proj, weights, counts)
        return y_PD.to(x_PD.dtype)
