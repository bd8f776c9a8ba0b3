"""A linear layer whose three GEMMs run in FP8 (DeepSeek-V3 report, section 3.3 and figure 6).

    fprop   y  = x @ W.T     x in 1x128 tiles,                W in 128x128 blocks
    dgrad   dx = dy @ W      dy in 1x128 tiles,               W in 128x128 blocks, codes transposed
    wgrad   dW = dy.T @ x    dy.T in 1x128 tiles (of tokens), x.T in 1x128 tiles (of tokens)

The activation waits for the backward pass in FP8. There it is dequantised, transposed and quantised again
along the tokens (section 3.5.2); with power-of-two scales that second rounding only moves exponents, and
loses only what falls below the new tile's range. The output of attention may wait in E5M6 instead: in the
report the backward pass of attention reads it too and is sensitive to precision (section 3.3.3). Here
attention keeps its own output, so the finer format buys precision and costs memory. Gradients keep 1x128
tiles: in 128x128 blocks they made a 16B model diverge (appendix B.2).

The weight is quantised in each pass, or, given a `copy` (`kernels.layers.weight`), once an optimizer step.
When its gradient is computed and where it goes is said in `kernels.layers.wgrad`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.formats.e5m6 import E5M6, quantize_e5m6
from kernels.formats.quantize import TILES, Quantized, quantize_tiles
from kernels.layers.activation import FP8Activation
from kernels.layers.operand import FP8Operand, values_and_tiles
from kernels.layers.products import OneWeight, Products
from kernels.layers.weight import FP8Weight
from kernels.layers.wgrad import MainGrad, WgradQueue


def fp8_linear(
    x: torch.Tensor | FP8Activation,
    weight: torch.Tensor,
    *,
    power_of_two: bool = False,
    e5m6: bool = False,
    copy: FP8Weight | None = None,
    main_grad: MainGrad | None = None,
    queue: WgradQueue | None = None,
) -> torch.Tensor:
    """y = x @ weight.T with FP8 products and FP32 sums, forward and backward.

    x is [..., in], weight [out, in], each FP32 or BF16, on one device; y [..., out] has the type of x. Each
    gradient has the type of its tensor (FP32 for a master weight). There may be no tokens at all, as for an
    idle expert: y is then empty and the gradient of the weight zero. Several layers that read the same x can
    share its codes: an `FP8Activation`.

    `power_of_two` rounds the scales that are made here up to powers of two. An `FP8Activation` that has such
    scales gets them along the tokens as well, whatever `power_of_two` is. `e5m6` keeps x for the weight
    gradient in E5M6, and makes its scales powers of two, as the report does for the output of attention.
    `copy` is the weight in FP8, made by `FP8Weights.of`. `main_grad` (FP32, the weight's shape; or a function
    that gives it in the backward pass) takes the weight's gradient, added at the end of its GEMM; autograd
    then gives the weight none. With a `queue` the backward pass computes the gradient of x alone, and
    `queue.run()` that of the weight.

    On a CPU the same quantisation runs with FP32 products (the emulation of precision policy `fp8`).

    Raises:
        ValueError, TypeError: shapes, types, devices or options do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support, or `copy` is used after its scope.
    """
    if weight.dim() != 2 or len(x.shape) < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fp8_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be [..., in] and [out, in]"
        )
    if x.device != weight.device:
        raise ValueError(f"fp8_linear: x is on {x.device} and weight on {weight.device}; move one of them")
    if e5m6 and isinstance(x, FP8Activation):
        raise ValueError("fp8_linear: e5m6 caches the values of x, and x holds E4M3 codes; pass a tensor")
    read = FP8Operand("fp8_linear", weight, copy, main_grad, queue, power_of_two)
    values, tiles, x_power_of_two = values_and_tiles(x)
    y = FP8Linear.apply(values, weight, tiles, x_power_of_two, OneWeight(), read, e5m6)
    return y.view(*x.shape[:-1], weight.shape[0])


class FP8Linear(torch.autograd.Function):
    """The autograd function behind `fp8_linear` and `fp8_grouped_linear`, over matrices: x [tokens, in]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        tiles: Quantized | None,
        x_power_of_two: bool,
        products: Products,
        read: FP8Operand,
        e5m6: bool,
    ) -> torch.Tensor:
        if tiles is None:
            tiles = quantize_tiles(x, power_of_two=read.power_of_two or e5m6)
        # Only what a backward pass will read is kept alive.
        cached: tuple[torch.Tensor | None, ...] = (None, None)
        if ctx.needs_input_grad[1]:
            wide = quantize_e5m6(x) if e5m6 else None
            cached = (tiles.codes, tiles.scales) if wide is None else (wide.packed, wide.scales)
        ctx.save_for_backward(*cached, read.kept(weight, ctx.needs_input_grad[0]))
        ctx.products, ctx.read, ctx.e5m6 = products, read, e5m6
        ctx.turned_power_of_two = read.power_of_two or e5m6 or x_power_of_two
        ctx.x_dtype, ctx.cols = x.dtype, x.shape[1]
        return products.product(tiles, read.blocks(weight), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales, weight = ctx.saved_tensors
        products, read = ctx.products, ctx.read
        need_x, need_weight = ctx.needs_input_grad[:2]
        rows, by_token = products.both_ways(dy, need_x, need_weight, read.power_of_two)
        dx = dw = None
        if rows is not None:
            dx = products.product(rows, read.transposed(weight), ctx.x_dtype)
        if by_token is not None:
            cached = E5M6(codes, scales, ctx.cols) if ctx.e5m6 else Quantized(codes, scales, TILES)
            power_of_two = ctx.turned_power_of_two
            dw = read.target.settle(products, by_token, lambda: products.turned(cached, power_of_two))
        return dx, dw, None, None, None, None, None
