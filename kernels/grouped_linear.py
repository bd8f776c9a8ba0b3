"""The linear layers of all experts, in grouped FP8 GEMMs (DeepSeek-V3 report, section 3.3 and figure 6).

    fprop   y[rows of e]  = x[rows of e] @ W[e].T     x in 1x128 tiles,   W in 128x128 blocks
    dgrad   dx[rows of e] = dy[rows of e] @ W[e]      dy in 1x128 tiles,  W in 128x128 blocks, transposed
    wgrad   dW[e] = dy[rows of e].T @ x[rows of e]    both in tiles of 128 tokens that start in each expert

Everything else is as in `kernels.linear`: the activation waits for the backward pass in FP8 and is quantised
again along the tokens, the weight is kept as it is and quantised in each pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.grouped_gemm import grouped_gemm, grouped_gemm_k
from kernels.grouped_quantize import quantize_experts, quantize_tokens
from kernels.quantize import TILES, Quantized, dequantize, quantize_tiles


def fp8_grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, *, power_of_two: bool = False
) -> torch.Tensor:
    """y = x @ weight[e].T for the tokens of each expert e: FP8 products, FP32 sums, forward and backward.

    x is [tokens, in], sorted by expert, weight [experts, out, in], each FP32 or BF16; y [tokens, out] has the
    type of x. Tokens of expert e are rows offsets[e] to offsets[e + 1] (int32 or int64, [experts + 1], on the
    same device, never read by the host on a GPU). Rows past the last offset give zeros and zero gradients.
    Each gradient has the type of its tensor; that of an expert without tokens is zero.

    `power_of_two` rounds scales up to powers of two, as the report does for the activation after attention.

    On a CPU the same quantisation runs with FP32 products (the emulation of precision policy `fp8`).

    Raises:
        ValueError, TypeError: shapes, types, devices or offsets do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"fp8_grouped_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be [tokens, in] and [experts, out, in]"
        )
    if not x.device == weight.device == offsets.device:
        raise ValueError(
            f"fp8_grouped_linear: x is on {x.device}, weight on {weight.device} and offsets on "
            f"{offsets.device}; move them to one device"
        )
    return FP8GroupedLinear.apply(x, weight, offsets, power_of_two)


class FP8GroupedLinear(torch.autograd.Function):
    """The autograd function behind `fp8_grouped_linear`: x [tokens, in], weight [experts, out, in]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, power_of_two: bool
    ) -> torch.Tensor:
        x_fp8 = quantize_tiles(x, power_of_two=power_of_two)
        # Only what a backward pass will read is kept alive.
        cached = (x_fp8.codes, x_fp8.scales) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*cached, weight if ctx.needs_input_grad[0] else None, offsets)
        ctx.power_of_two = power_of_two
        ctx.x_dtype, ctx.weight_dtype, ctx.weight_shape = x.dtype, weight.dtype, weight.shape
        return grouped_gemm(x_fp8, quantize_experts(weight, power_of_two=power_of_two), offsets, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        codes, scales, weight, offsets = ctx.saved_tensors
        power_of_two = ctx.power_of_two
        dx = dw = None
        if ctx.needs_input_grad[0]:
            weight_fp8 = quantize_experts(weight, power_of_two=power_of_two)
            dy_fp8 = quantize_tiles(dy, power_of_two=power_of_two)
            dx = grouped_gemm(dy_fp8, weight_fp8.transpose(), offsets, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x = dequantize(Quantized(codes, scales, TILES))
            x_by_token = quantize_tokens(x, offsets, power_of_two=power_of_two)
            dy_by_token = quantize_tokens(dy, offsets, power_of_two=power_of_two)
            dw = torch.zeros(ctx.weight_shape, dtype=torch.float32, device=dy.device)
            grouped_gemm_k(dy_by_token, x_by_token, offsets, dw)
            dw = dw.to(ctx.weight_dtype)
        return dx, dw, None, None
