"""SwiGLU feed-forward: w2(silu(w1 x) * w3 x), for dense layers and shared experts.

Legend: D hidden, F width; the gate and up projections are one matrix [2F, D], gate rows first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.precision import Precision
from model.recompute import remember


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of both halves side by side, [..., 2F] -> [..., F].

    It may be recomputed from its input (report §3.3.3).
    """
    gate, up = both.chunk(2, dim=-1)
    opened = remember(F.silu(gate), lambda: F.silu(gate))
    return remember(opened * up, lambda: F.silu(gate) * up)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = swiglu(self.precision.linear(x, self.gate_up_proj))
        return self.precision.linear(hidden, self.down_proj)
