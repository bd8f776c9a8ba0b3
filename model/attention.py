"""Causal attention over expanded heads, with or without document boundaries.

Pretraining packs documents without a mask between them (report §4.1); fine-tuning samples must not see each
other (§5.1). Both go through the same operator: boundaries are one more argument, and nothing else changes.
On a Hopper GPU that operator is `kernels.attention.mla_attention`, elsewhere PyTorch's (`attend`).
Legend: B batch, T positions, H heads, K width of a query or key head, V width of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fused(device: torch.device) -> bool:
    """Whether attention runs in the kernels of `kernels/`, which need a Hopper GPU."""
    if device.type != "cuda":
        return False
    from kernels.attention.mla_tiles import supported

    return supported(device)


def boundaries(segments_BT: Tensor) -> Tensor:
    """What separates documents, in the form that attention takes on this device.

    For the kernels the position where each position's document begins, int32 [B, T]; elsewhere a mask, bool
    [B, 1, T, T].
    """
    if not fused(segments_BT.device):
        return boundary_mask(segments_BT)
    from kernels.attention.mla_tiles import document_starts

    return document_starts(segments_BT)


def shortened(bounds: Tensor, length: int) -> Tensor:
    """The boundaries of the first `length` positions."""
    return bounds[:, :length] if bounds.dim() == 2 else bounds[..., :length, :length]


def boundary_mask(segments_BT: Tensor) -> Tensor:
    """True where a query may look: same segment and not later. Bool [B, 1, T, T].

    Padding (segment -1) is a segment of its own, so that no row of the softmax is empty.
    """
    length = segments_BT.shape[1]
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (same & causal)[:, None]


def attend(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T scale) v with a causal mask, or `mask` (bool, broadcast to [B, H, T, T]) -> [B, H, T, V].

    The fused kernels want K = V; see `MultiHeadLatentAttention`, which pads.
    """
    return F.scaled_dot_product_attention(
        q_BHTK, k_BHTK, v_BHTV, attn_mask=mask, is_causal=mask is None, scale=scale
    )
