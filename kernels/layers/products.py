"""The three FP8 products of a linear layer, for one weight and for the weights of all experts.

    fprop, dgrad   `product`           rows in 1x128 tiles times a weight in 128x128 blocks
    wgrad          `weight_gradient`   both operands in 1x128 tiles along the tokens

A layer is written once, over either. `OneWeight` runs the dense GEMMs, `EachExpert` the grouped ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from kernels.formats.e5m6 import E5M6
from kernels.formats.grouped_quantize import (
    QuantizedExperts,
    quantize_tokens,
    quantize_tokens_both,
    requantize_tokens,
)
from kernels.formats.quantize import Quantized, quantize_tiles
from kernels.formats.transpose import quantize_both, requantize_transpose
from kernels.gemms.gemm import gemm, gemm_add
from kernels.gemms.grouped_gemm import grouped_gemm, grouped_gemm_k


@dataclass(frozen=True)
class OneWeight:
    """Every row is multiplied with the same weight [out, in]."""

    def product(self, a: Quantized, weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """Rows [tokens, K] times the transposed blocks [N, K]: [tokens, N] in `dtype`."""
        return gemm(a, weight, dtype)

    def both_ways(
        self, dy: torch.Tensor, rows: bool, tokens: bool, power_of_two: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """Tiles along the rows of dy [tokens, channels], for dgrad, and along its tokens, for wgrad."""
        if rows and tokens:
            return quantize_both(dy, power_of_two=power_of_two)
        return (
            quantize_tiles(dy, power_of_two=power_of_two) if rows else None,
            quantize_tiles(dy.t(), power_of_two=power_of_two) if tokens else None,
        )

    def turned(self, cached: Quantized | E5M6, power_of_two: bool) -> Quantized:
        """Tiles along the tokens, of what waits in tiles along the rows."""
        return requantize_transpose(cached, power_of_two=power_of_two)

    def add_weight_gradient(self, dy: Quantized, x: Quantized, out: torch.Tensor) -> None:
        """Add the gradient of the weight into `out` (FP32)."""
        gemm_add(dy, x, out)

    def weight_gradient(
        self, dy: Quantized, x: Quantized, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        """The gradient of the weight in `dtype`."""
        return gemm(dy, x, dtype)


@dataclass(frozen=True)
class EachExpert:
    """Rows offsets[e] to offsets[e + 1] are multiplied with the weight of expert e of [experts, out, in].

    Otherwise as `OneWeight`. Rows of no expert give zeros, and tiles along the tokens are of one expert each.
    """

    offsets: torch.Tensor

    def product(self, a: Quantized, weight: QuantizedExperts, dtype: torch.dtype) -> torch.Tensor:
        return grouped_gemm(a, weight, self.offsets, dtype)

    def both_ways(
        self, dy: torch.Tensor, rows: bool, tokens: bool, power_of_two: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        if rows and tokens:
            return quantize_tokens_both(dy, self.offsets, power_of_two=power_of_two)
        return (
            quantize_tiles(dy, power_of_two=power_of_two) if rows else None,
            quantize_tokens(dy, self.offsets, power_of_two=power_of_two) if tokens else None,
        )

    def turned(self, cached: Quantized, power_of_two: bool) -> Quantized:
        return requantize_tokens(cached, self.offsets, power_of_two=power_of_two)

    def add_weight_gradient(self, dy: Quantized, x: Quantized, out: torch.Tensor) -> None:
        grouped_gemm_k(dy, x, self.offsets, out)

    def weight_gradient(
        self, dy: Quantized, x: Quantized, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        out = torch.zeros(shape, dtype=torch.float32, device=dy.codes.device)
        grouped_gemm_k(dy, x, self.offsets, out)
        return out.to(dtype)


Products: TypeAlias = OneWeight | EachExpert
