"""SwiGLU feed-forward: w2(silu(w1 x) * w3 x), for dense layers and shared experts.

Legend: D hidden, F width; the gate and up projections are one matrix [2F, D], gate rows first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.precision import Precision


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.precision.linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return self.precision.linear(F.silu(gate) * up, self.down_proj)
