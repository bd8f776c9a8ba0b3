"""Multi-token prediction: sequential modules that predict further ahead, in training only (report §2.2).

Depth k sees the state of depth k-1 at position i and the embedding of token i+k, and predicts token i+k+1.
Embedding and output head are the main model's own. The state handed on is taken before the final norm (the
report does not say which). Inputs are concatenated [embedding; hidden] as in the released weights, the
reverse of equation 21: from scratch it makes no difference, when loading those weights it does.
Legend: B batch, T positions, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.block import Block
from model.config import ModelConfig
from model.gate import Routing
from model.norm import RMSNorm
from model.precision import Precision


class MTPModule(nn.Module):
    def __init__(self, config: ModelConfig, depth: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Parameter(torch.empty(config.hidden_size, 2 * config.hidden_size))
        self.block = Block(config, config.num_hidden_layers + depth, precision)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        next_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        bounds: Tensor | None,
        valid_BT: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        """States of the depth before and embeddings of the tokens one further on -> this depth's states."""
        joined = torch.cat((self.enorm(next_BTD), self.hnorm(hidden_BTD)), dim=-1)
        return self.block(self.precision.linear(joined, self.eh_proj), cos, sin, bounds, valid_BT)
