"""RMSNorm fused with FP8 quantisation, and its backward pass (DeepSeek-V3 report, sections 3.2.3 and 3.3).

    inverse = 1 / sqrt(mean(x**2) + eps)      of each row
    out     = x * inverse * weight            straight into 1x128 FP8 tiles, the operand of the next GEMM

The backward pass recomputes the normalised row from x and `inverse`; the output is kept nowhere.

All arithmetic is FP32, one correctly rounded operation a step, the sum over a row in the order that
`exact.py` gives. Reference and kernel agree bit for bit in codes, scales, `inverse` and dx. Only `dweight`, a
sum over rows, is added in another order by the kernel and agrees to FP32 rounding.

The edges are those of `quantize.py`, with one more. A row whose sum of squares is not finite in FP32 (it
holds a NaN, an infinity or values beyond about 1e19) has inverse NaN and is NaN as a whole: the inverse of
infinity would turn the rest of the row to zeros, unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.exact import STEP, kernel_lane_sum, kernel_lane_sums, row_sums, square_root_
from kernels.formats.quantize import (
    TILES,
    Quantized,
    check_values,
    empty_quantized,
    kernel_encode,
    kernel_scale,
    magnitude_bits,
    quantize_reference,
)

MIN_EPS = 2.0**-126  # below it, a row of zeros would have the inverse infinity in FP32
SLAB = 16  # rows that one program of the backward pass takes, and sums for the weight's gradient
SUMMED = 32  # columns that one program sums over all slabs
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# A thread loads 16 bytes a step. With four warps it would keep 56 FP32 values of a row of 7168.
QUANTIZE_OPTIONS = {torch.bfloat16: OPTIONS, torch.float32: {**OPTIONS, "num_warps": 8}}
# Rows of up to SHORT steps are taken two at a time by four warps: 25 us for 4096 x 1536 on an H200, where one
# row at a time takes eight warps 31 us, and two 68. For 4096 x 7168 eight warps take 79 us and sixteen 109.
SHORT = 2
BACKWARD_OPTIONS = {
    torch.bfloat16: {**OPTIONS, "num_warps": 8},
    torch.float32: {**OPTIONS, "num_warps": 16},  # with 8, a few registers of a row of 7168 would spill
}


def rmsnorm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, power_of_two: bool = False
) -> tuple[Quantized, torch.Tensor]:
    """RMSNorm of the rows of `x` in 1x128 tiles [rows, cols], and the inverse RMS of each row [rows] in FP32.

    `x` is [rows, cols] with any strides, `weight` [cols], each FP32 or BF16. Any width will do. `eps`
    lies between 2**-126, the smallest normal FP32 number, and 1.

    Raises:
        TypeError, ValueError: types, shapes, devices or `eps` do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support.
    """
    _check("rmsnorm_quantize", x, weight)
    if not MIN_EPS <= eps <= 1:
        raise ValueError(f"rmsnorm_quantize: eps is {eps}; it must lie between 2**-126 and 1")
    function = rmsnorm_quantize_triton if runs_triton(x) else rmsnorm_quantize_reference
    return function(x, weight, eps, power_of_two=power_of_two)


def rmsnorm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x * inverse * weight, given `dy` [rows, cols], the gradient of that product.

    `x`, `weight` and `inverse` are those of `rmsnorm_quantize`; `dy` is FP32 or BF16 with any strides. The
    gradient of `x` has the type of `dy`, that of the weight [cols] its own. Quantisation counts as the
    identity: the gradients are those of the product before it.

    Raises:
        TypeError, ValueError: types, shapes or devices do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support.
    """
    _check("rmsnorm_backward", x, weight)
    if dy.shape != x.shape:
        raise ValueError(
            f"rmsnorm_backward: dy has shape {tuple(dy.shape)} and x {tuple(x.shape)}; they must be equal"
        )
    check_values("rmsnorm_backward", "dy", dy, x, "x")
    if tuple(inverse.shape) != (x.shape[0],) or inverse.dtype != torch.float32:
        raise ValueError(
            f"rmsnorm_backward: inverse is {inverse.dtype} {tuple(inverse.shape)}; "
            f"x {tuple(x.shape)} needs torch.float32 {(x.shape[0],)}"
        )
    check_values("rmsnorm_backward", "inverse", inverse, x, "x")
    function = rmsnorm_backward_triton if runs_triton(x) else rmsnorm_backward_reference
    return function(dy, x, weight, inverse)


def rmsnorm_quantize_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, power_of_two: bool = False
) -> tuple[Quantized, torch.Tensor]:
    """The PyTorch reference: the kernel must agree with it bit for bit."""
    values = x.float()
    total = row_sums(values * values)
    # A tensor as divisor: on a GPU, torch divides by a Python number with its reciprocal.
    mean = total / torch.full_like(total, max(x.shape[1], 1))
    inverse = square_root_(mean.add_(eps)).reciprocal_()
    inverse = torch.where(total < torch.inf, inverse, torch.nan)
    product = (values * inverse[:, None]).mul_(weight.float())
    return quantize_reference(product, TILES, power_of_two=power_of_two), inverse


def rmsnorm_backward_reference(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The PyTorch reference: the kernel must agree with its dx bit for bit, and with its dweight closely."""
    grad = dy.float()
    normed = x.float() * inverse[:, None]
    d_weight = (grad * normed).sum(dim=0).to(weight.dtype)
    grad = grad * weight.float()
    total = row_sums(grad * normed)
    mean = total / torch.full_like(total, max(x.shape[1], 1))
    dx = grad.sub_(normed.mul_(mean[:, None])).mul_(inverse[:, None])
    return dx.to(dy.dtype), d_weight


def rmsnorm_quantize_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, power_of_two: bool = False
) -> tuple[Quantized, torch.Tensor]:
    """The Triton kernel: what `rmsnorm_quantize` runs on a GPU."""
    codes, scales = empty_quantized(x, TILES)
    rows, cols = x.shape
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows > 0:
        with torch.cuda.device_of(x):
            quantize_kernel[(rows,)](
                x, weight.contiguous(), codes, scales, inverse, cols, float(eps), *x.stride(),
                POWER_OF_TWO=power_of_two, STEPS=-(-cols // STEP), **QUANTIZE_OPTIONS[x.dtype],
            )  # fmt: skip
    return Quantized(codes, scales, TILES), inverse


def rmsnorm_backward_triton(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernels: what `rmsnorm_backward` runs on a GPU."""
    rows, cols = x.shape
    dx = torch.empty(x.shape, dtype=dy.dtype, device=x.device)
    d_weight = torch.empty_like(weight)
    slabs = -(-rows // SLAB)
    partial = torch.empty((slabs, cols), dtype=torch.float32, device=x.device)
    if cols > 0:
        steps = -(-cols // STEP)
        with torch.cuda.device_of(x):
            if rows > 0:
                backward_kernel[(slabs,)](
                    dy, x, weight.contiguous(), inverse.contiguous(), dx, partial, rows, cols,
                    *dy.stride(), *x.stride(),
                    SLAB=SLAB, STEPS=steps, **backward_shape(steps, x.dtype),
                )  # fmt: skip
            sum_kernel[(-(-cols // SUMMED),)](partial, d_weight, slabs, cols, SUMMED=SUMMED, **OPTIONS)
    return dx, d_weight


def backward_shape(steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Rows that a program of the backward pass takes at a time, and its launch options."""
    if steps <= SHORT:
        return {"ROWS": 2, **OPTIONS}
    return {"ROWS": 1, **BACKWARD_OPTIONS[dtype]}


def _check(function: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}; pass a matrix [rows, cols]")
    check_values(function, "x", x, x, "x")
    if tuple(weight.shape) != (x.shape[1],):
        raise ValueError(
            f"{function}: weight has shape {tuple(weight.shape)}; x {tuple(x.shape)} needs {(x.shape[1],)}"
        )
    check_values(function, "weight", weight, x, "x")


@jit
def quantize_kernel(
    x, weight, codes, scales, inverse, cols, eps, stride_row, stride_col,
    POWER_OF_TWO: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: one row, kept in registers: STEPS times eight tiles."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(cols, 128)
    lanes = tl.zeros((8, 128), dtype=tl.float32)
    kept = ()
    for step in tl.static_range(STEPS):
        values = _load_tiles(x + row * stride_row, step * 8, cols, stride_col)
        lanes += values * values
        kept += (values,)
    total = kernel_lane_sum(lanes)
    mean = tl.div_rn(total, tl.maximum(cols, 1).to(tl.float32))
    inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    inverse_rms = tl.where(total < float("inf"), inverse_rms, float("nan"))
    tl.store(inverse + row, inverse_rms)
    for step in tl.static_range(STEPS):
        tile = step * 8 + tl.arange(0, 8)
        col = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
        product = kept[step] * inverse_rms * _load_tiles(weight, step * 8, cols, 1)
        # Past the last column zero times NaN is NaN, but a NaN there changes no tile: the row is all NaN.
        scale = kernel_scale(tl.max(magnitude_bits(product), axis=1), POWER_OF_TWO)
        tl.store(codes + row * cols + col, kernel_encode(product, scale[:, None]), mask=col < cols)
        tl.store(scales + row * tiles + tile, scale, mask=tile < tiles)


@jit
def backward_kernel(
    dy, x, weight, inverse, dx, partial, rows, cols, dy_stride_row, dy_stride_col, stride_row, stride_col,
    SLAB: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: dx of SLAB rows, ROWS at a time, and their sums for the weight's gradient.

    Rows are read twice, once for their sum and once for dx, the second time from the cache.
    """
    slab = tl.program_id(0).to(tl.int64)
    sums = ()
    for _ in tl.static_range(STEPS):
        sums += (tl.zeros((1024,), dtype=tl.float32),)
    for first in range(0, SLAB, ROWS):
        row = slab * SLAB + first + tl.arange(0, ROWS)
        inverse_rms = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        lanes = tl.zeros((ROWS, 1024), dtype=tl.float32)
        for step in tl.static_range(STEPS):
            grad = _load(dy, row, rows, step, cols, dy_stride_row, dy_stride_col)
            values = _load(x, row, rows, step, cols, stride_row, stride_col)
            lanes += (grad * _load_weight(weight, step, cols)) * (values * inverse_rms)
        mean = tl.div_rn(kernel_lane_sums(lanes), tl.maximum(cols, 1).to(tl.float32))[:, None]
        added = ()
        for step in tl.static_range(STEPS):
            grad = _load(dy, row, rows, step, cols, dy_stride_row, dy_stride_col)
            normed = _load(x, row, rows, step, cols, stride_row, stride_col) * inverse_rms
            added += (sums[step] + tl.sum(grad * normed, axis=0),)
            value = (grad * _load_weight(weight, step, cols) - normed * mean) * inverse_rms
            col = (step * 1024 + tl.arange(0, 1024))[None, :]
            at = dx + row[:, None] * cols + col
            tl.store(at, value.to(dx.dtype.element_ty), mask=(row < rows)[:, None] & (col < cols))
        sums = added
    for step in tl.static_range(STEPS):
        col = step * 1024 + tl.arange(0, 1024)
        tl.store(partial + slab * cols + col, sums[step], mask=col < cols)


@jit
def sum_kernel(partial, d_weight, slabs, cols, SUMMED: tl.constexpr):
    """One program: SUMMED columns of the weight's gradient, summed over all slabs."""
    col = (tl.program_id(0) * SUMMED + tl.arange(0, SUMMED))[None, :]
    lanes = tl.zeros((64, SUMMED), dtype=tl.float32)
    for first in range(0, slabs, 64):
        slab = (first + tl.arange(0, 64))[:, None]
        at = partial + slab.to(tl.int64) * cols + col
        lanes += tl.load(at, mask=(slab < slabs) & (col < cols), other=0.0)
    total = tl.sum(lanes, axis=0)[None, :]
    tl.store(d_weight + col, total.to(d_weight.dtype.element_ty), mask=col < cols)


@jit
def _load(source, row, rows, step, cols, stride_row, stride_col):
    """FP32 values [rows, 1024] of some rows from column 1024 * step on, zero past the last of either."""
    col = (step * 1024 + tl.arange(0, 1024))[None, :]
    at = source + row[:, None] * stride_row + col.to(tl.int64) * stride_col
    return tl.load(at, mask=(row < rows)[:, None] & (col < cols), other=0.0).to(tl.float32)


@jit
def _load_tiles(source, first, cols, stride_col):
    """FP32 values [8, 128] of a row from tile `first` on, zero past the last column."""
    col = (first + tl.arange(0, 8))[:, None] * 128 + tl.arange(0, 128)[None, :]
    return tl.load(source + col.to(tl.int64) * stride_col, mask=col < cols, other=0.0).to(tl.float32)


@jit
def _load_weight(weight, step, cols):
    """FP32 values [1, 1024] from column 1024 * step on."""
    col = (step * 1024 + tl.arange(0, 1024))[None, :]
    return tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32)
