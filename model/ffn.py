"""SwiGLU feed-forward: w2(silu(w1 x) * w3 x), for dense layers and shared experts.

Legend: D hidden, F width; the gate and up projections are one matrix [2F, D], gate rows first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.precision import Precision
from model.recompute import remember

if TYPE_CHECKING:
    from kernels.layers.activation import FP8Activation


class _SwiGLU(torch.autograd.Function):
    """Saves its input alone, and writes both halves of its gradient into one tensor."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _swiglu(both)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        return swiglu_backward(grad, both, F.silu(both.chunk(2, dim=-1)[0]))


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, both: Tensor, opened: Tensor) -> Tensor:
    """Gradient of silu(gate) * up for both halves, from that of the product; `opened` is silu(gate)."""
    gate, up = both.chunk(2, dim=-1)
    grad_both = torch.empty_like(both)
    grad_gate, grad_up = grad_both.chunk(2, dim=-1)
    torch.mul(grad, opened, out=grad_up)
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return grad_both


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of both halves side by side, [..., 2F] -> [..., F].

    It may be recomputed from its input (report §3.3.3).
    """
    return remember(_SwiGLU.apply(both), lambda: _swiglu(both))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))

    def forward(self, x: Tensor | FP8Activation) -> Tensor:
        if self.precision.fp8:
            return self.precision.fp8_mlp(x, self.gate_up_proj, self.down_proj)
        hidden = swiglu(self.precision.linear(x, self.gate_up_proj))
        return self.precision.linear(hidden, self.down_proj)
