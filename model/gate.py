"""The router: sigmoid affinities, node-limited top-k and load balance without an auxiliary loss (report
§2.1.2).

A bias is added to the affinities when experts are chosen and never anywhere else: it moves load, it is no
weight of the output and no gradient reaches it. After each step it is nudged against the global load.
Legend: B sequences, T positions, S tokens (B*T), E experts, K experts a token, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig


@dataclass
class Routing:
    """Where the tokens of one layer went."""

    experts_SK: Tensor  # int64, chosen experts
    weights_SK: Tensor  # float32, what their outputs are multiplied with, scaling factor included
    load_E: Tensor  # float32, tokens each expert received, padding not counted
    balance_loss: Tensor  # scalar, sum of f_i P_i averaged over sequences; 1 when perfectly balanced


class Gate(nn.Module):
    """Runs in float32 under every precision policy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None = None) -> Routing:
        """`valid_BT` marks real tokens; padding is routed like any token and counted nowhere."""
        batch, length, hidden = x_BTD.shape
        scores_SE = F.linear(x_BTD.reshape(-1, hidden).float(), self.weight.float()).sigmoid()
        experts_SK = self.select(scores_SE.detach() + self.e_score_correction_bias)
        chosen = scores_SE.gather(1, experts_SK)
        weights_SK = chosen / chosen.sum(-1, keepdim=True) * self.config.routed_scaling_factor
        valid_S = None if valid_BT is None else valid_BT.reshape(-1)
        load_E = self._count(experts_SK, valid_S)
        balance = (
            self._balance(scores_SE.view(batch, length, -1), valid_BT)
            if self.training
            else load_E.new_zeros(())
        )
        return Routing(experts_SK, weights_SK, load_E, balance)

    def select(self, biased_SE: Tensor) -> Tensor:
        """Top-k among the `topk_group` groups whose two best experts score highest: int64 [S, K]."""
        c = self.config
        if c.topk_group < c.n_group:
            grouped_SGE = biased_SE.view(-1, c.n_group, c.n_routed_experts // c.n_group)
            group_score = grouped_SGE.topk(min(2, grouped_SGE.shape[-1]), dim=-1).values.sum(-1)
            kept = group_score.topk(c.topk_group, dim=-1, sorted=False).indices
            blocked = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
            biased_SE = grouped_SGE.masked_fill(blocked[..., None], float("-inf")).flatten(1)
        return biased_SE.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices

    def _count(self, experts_SK: Tensor, valid_S: Tensor | None) -> Tensor:
        # Neither bincount nor an index of booleans: both wait for a GPU. Sums of integers have no order.
        counted_SK = torch.ones_like(experts_SK)
        if valid_S is not None:
            counted_SK = valid_S.long()[:, None].expand_as(experts_SK)
        load_E = experts_SK.new_zeros(self.config.n_routed_experts)
        return load_E.scatter_add_(0, experts_SK.flatten(), counted_SK.flatten()).float()

    def _balance(self, scores_BTE: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Equations 17-20. f ranks the unbiased affinities and is a constant; the gradient flows through
        P."""
        c = self.config
        top = scores_BTE.detach().topk(c.num_experts_per_tok, dim=-1, sorted=False).indices
        hits_BTE = torch.zeros_like(scores_BTE).scatter_(2, top, 1.0)
        share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
        if valid_BT is None:
            f_BE, p_BE = hits_BTE.mean(1), share_BTE.mean(1)
        else:
            keep = valid_BT[..., None].float()
            tokens = keep.sum(1).clamp(min=1.0)
            f_BE, p_BE = (hits_BTE * keep).sum(1) / tokens, (share_BTE * keep).sum(1) / tokens
        return (f_BE * p_BE).sum(-1).mean() * (c.n_routed_experts / c.num_experts_per_tok)

    @torch.no_grad()
    def nudge(self, load_E: Tensor, speed: float) -> None:
        """Move the bias of every overloaded expert down and of every underloaded one up by `speed`
        (gamma)."""
        self.e_score_correction_bias.add_(torch.sign(load_E.mean() - load_E), alpha=speed)
