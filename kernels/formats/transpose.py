"""FP8 quantisation along both sides of a matrix (DeepSeek-V3 report, sections 3.3.2 and 3.5.2).

The three GEMMs of a linear layer read their operands along different sides: fprop and dgrad sum over
channels, wgrad sums over tokens. So an output gradient is needed in 1x128 tiles of channels and in 1x128
tiles of tokens (the report's 128x1), a cached activation has to change from one to the other, and dgrad reads
the transposed weight. Each function here makes what it makes in one pass: on a GPU every value is read once
(`kernels.formats.square`).

    function               reads                        writes                     bytes a value, BF16
    quantize_both          values                       tiles, transposed tiles    2 + 1 + 1
    requantize_transpose   tiles, or the E5M6 cache     transposed tiles           1 + 1, or 1.5 + 1
    quantize_blocks_both   values                       blocks, transposed blocks  2 + 1 + 1

Scales and codes are those of `kernels.formats.quantize`, bit for bit; a transposed matrix is written
transposed. For tokens grouped by expert see `kernels.formats.grouped_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.backend import runs_triton
from kernels.formats import square
from kernels.formats.e5m6 import E5M6, dequantize_e5m6, dequantize_e5m6_reference
from kernels.formats.quantize import (
    BLOCKS,
    TILE,
    TILES,
    Quantized,
    check_input,
    dequantize,
    empty_quantized,
    encode,
    quantize_reference,
)


def quantize_both(x: torch.Tensor, *, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """A matrix x [rows, cols] (FP32 or BF16, any strides) in 1x128 tiles, and x.t() [cols, rows] in them.

    The same as `quantize_tiles(x), quantize_tiles(x.t())`, with `x` read once.

    Raises:
        TypeError, ValueError: `x` is not an FP32 or BF16 matrix.
        RuntimeError: `x` is on a GPU without FP8 support.
    """
    check_input("quantize_both", x)
    if runs_triton(x):
        return quantize_both_triton(x, power_of_two=power_of_two)
    return quantize_both_reference(x, power_of_two=power_of_two)


def requantize_transpose(q: Quantized | E5M6, *, power_of_two: bool = False) -> Quantized:
    """The transpose [cols, rows] in 1x128 tiles of a matrix [rows, cols] that is in 1x128 tiles or in E5M6.

    The same as `quantize_tiles(dequantize(q).t())`, in one pass. Where all scales are powers of two, E4M3
    codes only change exponents, and lose only what falls below the new tile's range.

    Raises:
        ValueError: `q` is in 128x128 blocks.
        RuntimeError: `q` is on a GPU without FP8 support.
    """
    if isinstance(q, Quantized) and q.block != TILES:
        raise ValueError("requantize_transpose: q is in 128x128 blocks; use q.transpose(), which is exact")
    if runs_triton(q.scales):
        return requantize_transpose_triton(q, power_of_two=power_of_two)
    return requantize_transpose_reference(q, power_of_two=power_of_two)


def quantize_blocks_both(w: torch.Tensor, *, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """A matrix w [rows, cols] (FP32 or BF16, any strides) in 128x128 blocks, and w.t() [cols, rows] in them.

    The same as `quantize_blocks(w)` and its `transpose()`: the operands of fprop and dgrad, in one pass.

    Raises:
        TypeError, ValueError: `w` is not an FP32 or BF16 matrix.
        RuntimeError: `w` is on a GPU without FP8 support.
    """
    check_input("quantize_blocks_both", w)
    if runs_triton(w):
        return quantize_blocks_both_triton(w, power_of_two=power_of_two)
    q = quantize_reference(w, BLOCKS, power_of_two=power_of_two)
    return q, q.transpose()


def quantize_both_reference(x: torch.Tensor, *, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""
    columns = encode_columns(lambda rows: x[rows], x.shape, x.device, power_of_two)
    return quantize_reference(x, TILES, power_of_two=power_of_two), columns


def requantize_transpose_reference(q: Quantized | E5M6, *, power_of_two: bool = False) -> Quantized:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""

    def values_of(rows: slice) -> torch.Tensor:
        if isinstance(q, E5M6):
            return dequantize_e5m6_reference(E5M6(q.packed[rows], q.scales[rows], q.cols))
        return dequantize(Quantized(q.codes[rows], q.scales[rows], TILES))

    return encode_columns(values_of, q.shape, q.scales.device, power_of_two)


def encode_columns(
    values_of: Callable[[slice], torch.Tensor], shape: torch.Size, device: torch.device, power_of_two: bool
) -> Quantized:
    """The transpose, in 1x128 tiles, of a matrix whose rows `values_of` gives.

    Codes are transposed, not values: a quarter of the bytes.
    """
    codes, scales = encode(values_of, shape, (TILE, 1), device, power_of_two)
    return Quantized(codes.t().contiguous(), scales.t().contiguous(), TILES)


def quantize_both_triton(x: torch.Tensor, *, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """The Triton kernel: what `quantize_both` runs on a GPU."""
    if x.stride(0) == 1 and x.stride(1) != 1:  # a transposed matrix: read it as it lies
        columns, rows = quantize_both_triton(x.t(), power_of_two=power_of_two)
        return rows, columns
    return _launch(x, TILES, power_of_two)


def quantize_blocks_both_triton(
    w: torch.Tensor, *, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """The Triton kernel: what `quantize_blocks_both` runs on a GPU."""
    if w.stride(0) == 1 and w.stride(1) != 1:
        columns, rows = quantize_blocks_both_triton(w.t(), power_of_two=power_of_two)
        return rows, columns
    return _launch(w, BLOCKS, power_of_two)


def requantize_transpose_triton(q: Quantized | E5M6, *, power_of_two: bool = False) -> Quantized:
    """The Triton kernel: what `requantize_transpose` runs on a GPU."""
    rows, cols = q.shape
    if isinstance(q, E5M6):
        if cols % square.ALIGNED != 0:
            return quantize_both_triton(dequantize_e5m6(q), power_of_two=power_of_two)[1]
        source = q.packed.view(-1).view(torch.int32).view(rows, 3 * cols // 8)
    else:
        source = q.codes
    codes = torch.empty((cols, rows), dtype=torch.float8_e4m3fn, device=source.device)
    scales = torch.empty((cols, -(-rows // TILE)), dtype=torch.float32, device=source.device)
    square.launch(
        source, q.scales, None, None, (codes, scales), -(-rows // TILE), cols,
        e5m6=isinstance(q, E5M6), power_of_two=power_of_two,
    )  # fmt: skip
    return Quantized(codes, scales, TILES)


def _launch(x: torch.Tensor, block: tuple[int, int], power_of_two: bool) -> tuple[Quantized, Quantized]:
    along_rows, along_columns = empty_quantized(x, block), empty_quantized(x.t(), block)
    square.launch(
        x, None, None, along_rows, along_columns, -(-x.shape[0] // TILE), x.shape[1],
        block=block == BLOCKS, power_of_two=power_of_two,
    )  # fmt: skip
    return Quantized(*along_rows, block), Quantized(*along_columns, block)
