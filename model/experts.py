"""The routed experts of a layer as one grouped product: no token is dropped, no expert is padded.

Tokens arrive sorted by expert; each expert's rows are one contiguous slice. The backward pass is written by
hand: it recomputes the activation from the saved gate and up values, and writes each expert's weight gradient
straight into its slice.
Legend: S (token, expert) pairs, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.ffn import swiglu
from model.precision import Precision


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        both = x_SD.new_empty(x_SD.shape[0], gate_up.shape[1])
        for x, w, out in zip(x_SD.split(counts), gate_up, both.split(counts), strict=True):
            torch.mm(x, w.t(), out=out)
        gate, up = both.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up)
        y_SD = torch.empty_like(x_SD)
        for h, w, out in zip(hidden.split(counts), down, y_SD.split(counts), strict=True):
            torch.mm(h, w.t(), out=out)
        ctx.counts = counts
        ctx.save_for_backward(x_SD, gate_up, down, both)
        return y_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_SD, gate_up, down, both = ctx.saved_tensors
        counts = ctx.counts
        grad_SD = grad_SD.contiguous()
        gate, up = both.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        hidden = silu * up
        grad_hidden = torch.empty_like(hidden)
        grad_down = torch.zeros_like(down)
        slices = zip(grad_SD.split(counts), hidden.split(counts), grad_hidden.split(counts), strict=True)
        for expert, (g, h, out) in enumerate(slices):
            if counts[expert]:
                torch.mm(g, down[expert], out=out)
                torch.mm(g.t(), h, out=grad_down[expert])
        # d silu(a)/da = s + silu(a) (1 - s), with s = sigmoid(a)
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad_hidden, silu, out=grad_up)
        torch.mul(grad_hidden.mul_(up), sigmoid.add_(silu.mul_(1 - sigmoid)), out=grad_gate)
        grad_x = torch.empty_like(x_SD)
        grad_gate_up = torch.zeros_like(gate_up)
        slices = zip(grad_both.split(counts), x_SD.split(counts), grad_x.split(counts), strict=True)
        for expert, (g, x, out) in enumerate(slices):
            if counts[expert]:
                torch.mm(g, gate_up[expert], out=out)
                torch.mm(g.t(), x, out=grad_gate_up[expert])
        return grad_x, grad_gate_up, grad_down, None


class RoutedExperts(nn.Module):
    """Weights of all experts of a layer: gate and up [E, 2F, D] (gate rows first), down [E, D, F]."""

    def __init__(self, experts: int, hidden: int, width: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_SD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> the experts' outputs, same order."""
        if self.precision.name == "fp32":
            return _GroupedSwiGLU.apply(x_SD, self.gate_up_proj, self.down_proj, counts)
        outputs = []
        # Unbound at once: the gradient of each index would be as large as all experts.
        weights = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        for x, (gate_up, down) in zip(x_SD.split(counts), weights, strict=True):
            if len(x):
                hidden = swiglu(self.precision.linear(x, gate_up))
                outputs.append(self.precision.linear(hidden, down))
        return torch.cat(outputs) if outputs else x_SD
