"""Quantisation along both sides of a matrix at once (DeepSeek-V3 report, sections 3.3.2 and 3.5.2)."""

from __future__ import annotations

import torch

from kernels.e5m6 import E5M6, dequantize_e5m6
from kernels.quantize import (
    BLOCKS,
    TILE,
    TILES,
    Quantized,
    dequantize,
    encode_reference,
    quantize_reference,
)

COLUMNS = (TILE, 1)


def quantize_both(x: torch.Tensor, *, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """A matrix [rows, cols] in 1x128 tiles, and its transpose [cols, rows] in 1x128 tiles."""
    return quantize_reference(x, TILES, power_of_two=power_of_two), _columns(x, power_of_two)


def requantize_transpose(q: Quantized | E5M6, *, power_of_two: bool = False) -> Quantized:
    """The transpose [cols, rows] in 1x128 tiles of a matrix [rows, cols] in 1x128 tiles, E4M3 or E5M6."""
    return _columns(dequantize_e5m6(q) if isinstance(q, E5M6) else dequantize(q), power_of_two)


def quantize_blocks_both(w: torch.Tensor, *, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """A matrix [rows, cols] in 128x128 blocks, and its transpose [cols, rows] in the same blocks."""
    q = quantize_reference(w, BLOCKS, power_of_two=power_of_two)
    return q, q.transpose()


def _columns(x: torch.Tensor, power_of_two: bool) -> Quantized:
    codes, scales = encode_reference(x, COLUMNS, power_of_two)
    return Quantized(codes.t().contiguous(), scales.t().contiguous(), TILES)
