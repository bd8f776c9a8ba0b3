"""DeepSeekMoE feed-forward: shared experts beside routed ones (report §2.1.2, equations 12-16).

The layer is four steps, so that a pipeline schedule can overlap them across micro-batches: route, dispatch,
experts, combine. Plain training calls them in order.
Legend: B batch, T positions, D hidden, S tokens (B*T), K experts a token, P (token, expert) pairs (S*K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.experts import RoutedExperts
from model.ffn import SwiGLU
from model.gate import Gate, Routing
from model.precision import Precision


@dataclass
class Dispatched:
    """Tokens sorted by expert, and the way back."""

    x_PD: Tensor
    token_P: Tensor  # which token each pair came from
    pair_P: Tensor  # its place in the flattened [S, K] choice
    counts: list[int]


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = RoutedExperts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, precision
        )
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, precision)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.gate(x_BTD, valid_BT)
        sent = self.dispatch(x_BTD, routing)
        return self.combine(x_BTD, self.experts(sent.x_PD, sent.counts), sent, routing), routing

    def dispatch(self, x_BTD: Tensor, routing: Routing) -> Dispatched:
        """Sort pairs by expert. The stable sort keeps the sum over a token's experts in one fixed order."""
        experts_P = routing.experts_SK.flatten()
        pair_P = experts_P.argsort(stable=True)
        token_P = pair_P // routing.experts_SK.shape[1]
        counts = torch.bincount(experts_P, minlength=self.gate.config.n_routed_experts).tolist()
        # Not by indexing: the backward pass of that adds with several threads in any order.
        rows_PD = x_BTD.reshape(-1, x_BTD.shape[-1]).index_select(0, token_P)
        return Dispatched(rows_PD, token_P, pair_P, counts)

    def combine(self, x_BTD: Tensor, y_PD: Tensor, sent: Dispatched, routing: Routing) -> Tensor:
        """Weighted sum of each token's experts, plus the shared expert."""
        weights_P1 = routing.weights_SK.flatten()[sent.pair_P, None].to(y_PD.dtype)
        flat = x_BTD.reshape(-1, x_BTD.shape[-1])
        base = self.shared_experts(flat) if self.shared_experts is not None else torch.zeros_like(flat)
        return base.index_add(0, sent.token_P, y_PD * weights_P1).view_as(x_BTD)
