"""Expert layers while decoding: a few rows, each to its own experts.

The products of a step are small, so what counts is how many there are and which weights they read. A few
rows go through their experts one by one; a batch goes through all experts at once, padded to the fullest
one; many rows, as in reading prompts, give each expert a product of its own.
Legend: S rows, D hidden, K experts a row, P (row, expert) pairs, E experts, M rows of the fullest expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.engine.tiles import TILE
from model.engine.weights import ExpertWeights, opened

FEW = 16
"""Pairs up to which experts are gone through one by one."""
EACH_ITS_OWN = 48
"""Mean rows an expert from which each gets its own product."""


def route(weights: ExpertWeights, x_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Experts of every row, int64 [S, K], and their weights, float32 [S, K], as `Gate` chooses them."""
    scores_SE = (x_SD.float() @ weights.router_DE).sigmoid_()
    experts_SK = weights.gate.select(scores_SE + weights.bias_E)
    chosen = scores_SE.gather(1, experts_SK)
    return experts_SK, chosen.div_(chosen.sum(-1, keepdim=True)).mul_(
        weights.gate.config.routed_scaling_factor
    )


def mixed(weights: ExpertWeights, x_SD: Tensor, experts_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """Weighted sum of each row's routed experts: [S, D]."""
    pairs, k = experts_SK.numel(), experts_SK.shape[1]
    if len(experts_SK) == 1:
        chosen = zip(experts_SK[0].tolist(), weights_SK[0].tolist(), strict=True)
        out_SD = torch.zeros_like(x_SD)
        for e, share in chosen:
            out_SD.add_(weights.expert(e, x_SD), alpha=share)
        return out_SD
    if pairs <= FEW:
        return _few(weights, x_SD, experts_SK.tolist(), weights_SK.tolist())
    experts_P = experts_SK.flatten()
    if weights.grouped and pairs < EACH_ITS_OWN * weights.count:
        # How many pairs before each went to its expert: its place among the expert's rows.
        went_PE = torch.zeros(pairs, weights.count, dtype=torch.int32, device=x_SD.device)
        went_PE.scatter_(1, experts_P[:, None], 1)
        so_far_PE = went_PE.cumsum(0)
        fullest = int(so_far_PE[-1].max())
        if x_SD.dtype == torch.bfloat16:
            # oneDNN compiles code for every new shape, which takes far longer than the product.
            fullest = -(-fullest // 8) * 8
        if fullest * weights.count <= 6 * pairs:
            place_P = experts_P * fullest + so_far_PE.gather(1, experts_P[:, None]).squeeze(1) - 1
            # Places that no pair has are filled with the first row, and nobody looks at what becomes of it.
            row_EM = place_P.new_zeros(weights.count * fullest)
            row_EM.index_copy_(0, place_P, torch.arange(pairs, device=x_SD.device) // k)
            x_EMD = x_SD.index_select(0, row_EM).view(weights.count, fullest, -1)
            y_EMD = torch.bmm(opened(torch.bmm(x_EMD, weights.gate_up_EDF)), weights.down_EFD)
            return weighted(y_EMD.flatten(0, 1).index_select(0, place_P), weights_SK)
    order_P = experts_P.argsort(stable=True)
    counts = torch.bincount(experts_P, minlength=weights.count).tolist()
    sorted_PD = x_SD.index_select(0, order_P // k)
    parts = zip(range(weights.count), sorted_PD.split(counts), strict=True)
    y_PD = torch.cat([weights.expert(e, x) for e, x in parts if len(x)])
    back_P = torch.empty_like(order_P).index_copy_(0, order_P, torch.arange(pairs, device=x_SD.device))
    return weighted(y_PD.index_select(0, back_P), weights_SK)


def _few(weights: ExpertWeights, x_SD: Tensor, experts: list[list[int]], shares: list[list[float]]) -> Tensor:
    """Each chosen expert's weights are read once, and no others."""
    chosen: dict[int, list[tuple[int, float]]] = {}
    for row, (own, weight) in enumerate(zip(experts, shares, strict=True)):
        for e, share in zip(own, weight, strict=True):
            chosen.setdefault(e, []).append((row, share))
    out_SD = torch.zeros_like(x_SD)
    for e, pairs in chosen.items():
        rows = [row for row, _ in pairs]
        whole = len(rows) == len(x_SD)
        x = x_SD if whole else x_SD[rows[0] : rows[0] + 1] if len(rows) == 1 else x_SD[rows]
        for (row, share), y_D in zip(pairs, weights.expert(e, x), strict=True):
            out_SD[row].add_(y_D, alpha=share)
    return out_SD


def weighted(y_PD: Tensor, weights_SK: Tensor) -> Tensor:
    """Sum over K of each row's K outputs, which lie next to each other, times their weights: [S, D]."""
    y_SKD = y_PD.unflatten(0, weights_SK.shape)
    return torch.bmm(weights_SK[:, None].to(y_PD.dtype), y_SKD).squeeze(1)


def mixed_invariant(weights: ExpertWeights, x_SD: Tensor, experts_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """`mixed` with every expert on tiles of a fixed number of rows, and one order of adding."""
    k = experts_SK.shape[1]
    experts_P = experts_SK.flatten()
    order_P = experts_P.argsort(stable=True)
    counts = torch.bincount(experts_P, minlength=weights.count).tolist()
    y_PD = torch.empty(experts_P.numel(), x_SD.shape[1], dtype=x_SD.dtype, device=x_SD.device)
    done = 0
    for e, count in enumerate(counts):
        for start in range(done, done + count, TILE):
            pairs = order_P[start : min(start + TILE, done + count)]
            x = F.pad(x_SD.index_select(0, pairs // k), (0, 0, 0, TILE - len(pairs)))
            y_PD[pairs] = weights.expert(e, x)[: len(pairs)]
        done += count
    y_SKD = y_PD.unflatten(0, weights_SK.shape)
    out = y_SKD[:, 0] * weights_SK[:, :1].to(y_PD.dtype)
    for number in range(1, k):
        out = out + y_SKD[:, number] * weights_SK[:, number : number + 1].to(y_PD.dtype)
    return out
