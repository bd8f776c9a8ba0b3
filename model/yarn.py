"""Rotary position embedding and its YaRN extension, as published (report §2.1.1 and §4.3).

Only the decoupled part of queries and keys is rotated, so extension touches nothing else: the frequencies
below and the softmax scale are all that a longer context changes.
Legend: B batch, T positions, H heads, R rotary width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig


def correction_range(config: ModelConfig) -> tuple[int, int]:
    """(low, high) pair indices between which YaRN blends interpolation in; (10, 23) at the V3 shape.

    A pair that turns more than `beta_fast` times over the original context keeps its frequency; one that
    turns less than `beta_slow` times is fully interpolated.
    """

    def pair_turning(rotations: float) -> float:
        dim, length = config.qk_rope_head_dim, config.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = math.floor(pair_turning(config.beta_fast))
    high = math.ceil(pair_turning(config.beta_slow))
    return max(low, 0), min(high, config.qk_rope_head_dim - 1)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position turns each rotary pair: float32 [R/2]."""
    pairs = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32)
    freqs = config.rope_theta ** -(pairs / config.qk_rope_head_dim)
    if config.rope_factor == 1.0:
        return freqs
    low, high = correction_range(config)
    # A range of zero width would divide by zero; the published code widens it the same way.
    ramp = ((torch.arange(len(freqs), dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freqs / config.rope_factor * ramp + freqs * (1 - ramp)


def softmax_scale(config: ModelConfig) -> float:
    """Factor on attention scores: 1/sqrt(qk width), times YaRN's temperature squared when extended.

    At the V3 shape 0.072169, and 0.135234 with s = 40 (sqrt(t) = 0.1 ln s + 1 = 1.368888).
    """
    scale = config.qk_head_dim**-0.5
    if config.rope_factor == 1.0:
        return scale
    return scale * (0.1 * config.mscale * math.log(config.rope_factor) + 1.0) ** 2


def rotation_table(
    config: ModelConfig, length: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position and pair, float32 [length, R/2] each."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    return angles.cos().to(device), angles.sin().to(device)


class _Rotate(torch.autograd.Function):
    """A turn by the opposite angle is its own gradient, so only the angles are saved. One copy each way,
    where parts that are split and put together again take more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    end = out[..., -2 * cos.shape[-1] :]
    # A copy, because pairs can be read as complex numbers only where they are aligned.
    wide = end.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin))
    end.copy_(wide)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs (2i, 2i+1) of the last R values; those before them stay.

    x [..., N + R]; cos and sin broadcast against [..., R/2]. Computed in float32, returned in x's type.
    """
    return _Rotate.apply(x, cos, sin)
