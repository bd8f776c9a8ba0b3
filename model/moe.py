"""DeepSeekMoE feed-forward: shared experts beside routed ones (report §2.1.2, equations 12-16).

The layer is four steps, so that a pipeline schedule can overlap them across micro-batches: route, dispatch,
experts, combine. Plain training calls them in order.
Legend: B batch, T positions, D hidden, S tokens (B*T), K experts a token, P rows of experts: (token,
expert) pairs (S*K), or a few more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.experts import RoutedExperts
from model.ffn import SwiGLU
from model.gate import Gate, Routing
from model.precision import Precision

if TYPE_CHECKING:
    from kernels.fused.permute import Plan
    from kernels.layers.activation import FP8Activation


@dataclass
class Dispatched:
    """Tokens sorted by expert, and the way back. Rows that fill up a block have weight zero."""

    x_PD: Tensor | FP8Activation
    token_P: Tensor  # which token each row came from
    weights_P1: Tensor  # float32, what each row's output is multiplied with
    counts: list[int] | Tensor
    x_SD: Tensor | FP8Activation  # what was sent, for the shared experts
    plan: Plan | None = None  # under fp8, the way back


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
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
        return self.combine(x_BTD, self.experts(sent.x_PD, sent.counts, sent.weights_P1), sent), routing

    def dispatch(self, x_BTD: Tensor, routing: Routing) -> Dispatched:
        """Sort pairs by expert. The stable sort keeps the sum over a token's experts in one fixed order."""
        flat = x_BTD.reshape(-1, x_BTD.shape[-1])
        if self.precision.fp8:
            return self._dispatch_fp8(flat, routing)
        pairs = routing.experts_SK.numel()
        experts_P = routing.experts_SK.flatten()
        pair_P = experts_P.argsort(stable=True)
        counts_E = torch.bincount(experts_P, minlength=self.gate.config.n_routed_experts)
        weights_P = routing.weights_SK.flatten()
        block = self.experts.block(pairs)
        if block > 1:
            pair_P, counts_E = _rounded_up(pair_P, counts_E, block)
            weights_P = F.pad(weights_P, (0, 1))
        token_P = (pair_P // routing.experts_SK.shape[1]).clamp_(max=flat.shape[0] - 1)
        # Not by indexing: the backward pass of that adds with several threads in any order.
        return Dispatched(
            flat.index_select(0, token_P),
            token_P,
            weights_P.index_select(0, pair_P)[:, None],
            counts_E.tolist(),
            flat,
        )

    def _dispatch_fp8(self, x_SD: Tensor, routing: Routing) -> Dispatched:
        """Quantised once a token, before it is sent (§3.3.3). Nothing here waits for a GPU."""
        from kernels.fused.permute import plan_rows
        from kernels.layers.activation import permute_fp8

        x = self.precision.operand(x_SD, power_of_two=True)
        plan = plan_rows(routing.experts_SK, self.gate.config.n_routed_experts)
        return Dispatched(
            permute_fp8(x, plan),
            plan.pair // routing.experts_SK.shape[1],
            routing.weights_SK.flatten().index_select(0, plan.pair)[:, None],
            plan.offsets.diff(),
            x,
            plan,
        )

    def combine(self, x_BTD: Tensor, y_PD: Tensor, sent: Dispatched) -> Tensor:
        """Sum of each token's experts, plus the shared expert."""
        base = self.shared_experts(sent.x_SD) if self.shared_experts is not None else None
        if sent.plan is not None:
            from kernels.fused.permute import unpermute

            routed = unpermute(y_PD, sent.plan)
            return (routed if base is None else base + routed).view_as(x_BTD)
        base = torch.zeros_like(sent.x_SD) if base is None else base
        return base.index_add_(0, sent.token_P, y_PD).view_as(x_BTD)


def _rounded_up(pair_P: Tensor, counts_E: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Each expert's pairs followed by as many that are none (one past the last) as make a multiple of
    `block`; and the new counts."""
    full_E = (counts_E + block - 1) // block * block
    gap_E = full_E - counts_E
    place_P = torch.arange(len(pair_P), device=pair_P.device)
    place_P += (gap_E.cumsum(0) - gap_E).repeat_interleave(counts_E)
    rounded = pair_P.new_full((int(full_E.sum()),), len(pair_P))
    return rounded.index_copy_(0, place_P, pair_P), full_E
