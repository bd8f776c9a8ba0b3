"""A linear layer whose three GEMMs run in FP8 (DeepSeek-V3 report, section 3.3 and figure 6).

    fprop   y  = x @ W.T     x in 1x128 tiles,                W in 128x128 blocks
    dgrad   dx = dy @ W      dy in 1x128 tiles,               W in 128x128 blocks, codes transposed
    wgrad   dW = dy.T @ x    dy.T in 1x128 tiles (of tokens), x.T in 1x128 tiles (of tokens)

The activation waits for the backward pass in FP8. There it is dequantised, transposed and quantised again
along the tokens (section 3.5.2); with power-of-two scales that second rounding only moves exponents, and
loses only what falls below the new tile's range. The weight is kept as it is (a parameter, so it costs
nothing) and quantised again in the backward pass. Gradients keep 1x128 tiles: in 128x128 blocks they made a
16B model diverge (appendix B.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.gemm import gemm
from kernels.quantize import TILES, Quantized, dequantize, quantize_blocks, quantize_tiles


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, *, power_of_two: bool = False) -> torch.Tensor:
    """y = x @ weight.T with FP8 products and FP32 sums, forward and backward.

    x is [..., in], weight [out, in], each FP32 or BF16, on one device; y [..., out] has the type of x. Each
    gradient has the type of its tensor (FP32 for a master weight). There may be no tokens at all, as for an
    idle expert: y is then empty and the gradient of the weight zero.

    `power_of_two` rounds scales up to powers of two, as the report does for the activation after attention.

    On a CPU the same quantisation runs with FP32 products (the emulation of precision policy `fp8`).

    Raises:
        ValueError, TypeError: shapes, types or devices do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fp8_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be [..., in] and [out, in]"
        )
    if x.device != weight.device:
        raise ValueError(f"fp8_linear: x is on {x.device} and weight on {weight.device}; move one of them")
    y = FP8Linear.apply(x.reshape(-1, x.shape[-1]), weight, power_of_two)
    return y.view(*x.shape[:-1], weight.shape[0])


class FP8Linear(torch.autograd.Function):
    """The autograd function behind `fp8_linear`, over matrices: x [tokens, in], weight [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, power_of_two: bool) -> torch.Tensor:
        x_fp8 = quantize_tiles(x, power_of_two=power_of_two)
        # Only what a backward pass will read is kept alive.
        cached = (x_fp8.codes, x_fp8.scales) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*cached, weight if ctx.needs_input_grad[0] else None)
        ctx.power_of_two = power_of_two
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return gemm(x_fp8, quantize_blocks(weight, power_of_two=power_of_two), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        codes, scales, weight = ctx.saved_tensors
        power_of_two = ctx.power_of_two
        dx = dw = None
        if ctx.needs_input_grad[0]:
            weight_fp8 = quantize_blocks(weight, power_of_two=power_of_two)
            dy_fp8 = quantize_tiles(dy, power_of_two=power_of_two)
            dx = gemm(dy_fp8, weight_fp8.transpose(), ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x = dequantize(Quantized(codes, scales, TILES))
            x_by_token = quantize_tiles(x.t(), power_of_two=power_of_two)
            dy_by_token = quantize_tiles(dy.t(), power_of_two=power_of_two)
            dw = gemm(dy_by_token, x_by_token, ctx.weight_dtype)
        return dx, dw, None
