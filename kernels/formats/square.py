"""The kernel that quantises a matrix along both of its sides at once: `transpose.py` launches it.

One program owns a square of 128x128 values, reads it once and writes the codes along its rows, along its
columns (transposed), or both. So every scale is found within one program.

    x         values (FP32, BF16), or FP8 codes with `x_scales` of 1x128 tiles, or E5M6 words
    offsets   rows belong to experts: squares start anew at each expert's first row

How the codes get from one side to the other: lanes hold 16 neighbours of a row, as 16-byte loads and stores
along rows want it. The rows of a square are dealt out in another order, row 8 i + j as the i-th of the j-th
sixteen, so that a thread holds rows that lie close together; the compiler then moves four codes of a column
as one word through shared memory.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.backend import jit, tl
from kernels.formats.quantize import TILE, kernel_encode, kernel_scale, magnitude_bits

# Without fusion every operation rounds on its own, as in the reference.
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
# Rows start at multiples of 16 values: other sizes are padded, since loads of single values spread a row over
# so many threads that the kernel spills registers.
ALIGNED = 16
LONGEST = 2**24  # columns, rows, strides: offsets inside a square are 32 bits wide

Parts = tuple[torch.Tensor, torch.Tensor]


def launch(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    along_rows: Parts | None,
    along_columns: Parts,
    squares: int,
    cols: int,
    *,
    block: bool = False,
    e5m6: bool = False,
    power_of_two: bool = False,
) -> None:
    """Quantise x [rows, cols] or [matrices, rows, cols] into codes and scales; `along_columns` is transposed.

    `squares` is the number of bands of 128 rows. With `block` there is one scale for each square.

    Raises:
        ValueError: the matrix is too large.
    """
    codes, scales = along_rows or (None, None)
    codes_t, scales_t = along_columns
    if codes_t.numel() == 0:
        return
    options = {"block": block, "e5m6": e5m6, "power_of_two": power_of_two}
    if cols % ALIGNED != 0:
        whole = -(-cols // TILE) * TILE
        wide = None if codes is None else (codes.new_empty((*codes.shape[:-1], whole)), scales)
        tall = (
            codes_t.new_empty((*codes_t.shape[:-2], whole, codes_t.shape[-1])),
            scales_t if block else scales_t.new_empty((whole, scales_t.shape[1])),
        )
        launch(_with_columns(x, whole), x_scales, offsets, wide, tall, squares, whole, **options)
        if wide is not None:
            codes.copy_(wide[0][..., :cols])
        codes_t.copy_(tall[0][..., :cols, :])
        if not block:
            scales_t.copy_(tall[1][:cols])
        return
    matrix = x if x.dim() == 3 else x[None]
    if not e5m6 and (
        matrix.stride(2) != 1 or any(one % ALIGNED for one in (*matrix.stride()[:2], matrix.data_ptr()))
    ):
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    rows, width, strides = matrix.shape[1], codes_t.shape[-1], matrix.stride()
    if max(rows, cols, width, strides[1]) >= LONGEST:
        raise ValueError(
            f"quantisation along both sides: a matrix of {rows} x {cols} with row stride {strides[1]}; "
            f"sizes from {LONGEST} on are not supported, so split the matrix"
        )
    experts = 0 if offsets is None else offsets.numel() - 1
    with torch.cuda.device_of(x):
        square_kernel[(squares * -(-cols // TILE),)](
            matrix, x_scales, offsets, codes, scales, codes_t, scales_t,
            rows, cols, width, experts, *strides,
            BLOCK=block, E5M6=e5m6, POWER_OF_TWO=power_of_two, EXPERTS=experts_range(experts),
            **OPTIONS,
        )  # fmt: skip


def _with_columns(x: torch.Tensor, cols: int) -> torch.Tensor:
    """Values or FP8 codes with zero columns added up to `cols`."""
    plain = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
    return torch.nn.functional.pad(plain, (0, cols - x.shape[-1])).view(x.dtype)


def experts_range(experts: int) -> int:
    """Length of the vector, a power of two of at least 32, in which a program reads all offsets.

    Never 128: with that the largest tile of the grouped GEMM spills registers.
    """
    length = 1 << max(experts - 1, 31).bit_length()
    return 256 if length == 128 else length


@jit
def square_kernel(
    x, x_scales, offsets, codes, scales, codes_t, scales_t,
    rows, cols, width, experts, stride_matrix, stride_row, stride_col,
    BLOCK: tl.constexpr, E5M6: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program: one square. `x_scales`, `offsets`, and both of `codes` and `scales` may be None."""
    tiles = tl.cdiv(cols, 128)
    bands = tl.cdiv(width, 128)
    tile = tl.program_id(0) % tiles
    band = tl.program_id(0) // tiles
    if offsets is None:
        matrix = (band // bands).to(tl.int64)
        band = band % bands
        first = band * 128
        read_end = rows
        end = rows
    else:
        matrix = tl.cast(0, tl.int64)
        first, read_end, end = _expert_rows(offsets, band, rows, experts, EXPERTS)

    index = tl.arange(0, 128)
    local = (index % 16) * 8 + index // 16
    row = first + local
    col = tile * 128 + index
    row_start = first.to(tl.int64)
    corner = x + matrix * stride_matrix + row_start * stride_row
    if E5M6:
        values = _load_e5m6(corner + tile * 48, local, tile, row < read_end, cols, stride_row)
    else:
        inside = (row < read_end)[:, None] & (col < cols)[None, :]
        corner += tile.to(tl.int64) * 128 * stride_col
        values = tl.load(
            corner + local[:, None] * stride_row + index[None, :] * stride_col, mask=inside, other=0.0
        )
        values = values.to(tl.float32)
    if x_scales is not None:
        at = x_scales + row_start * tiles + local * tiles + tile
        values = values * tl.load(at, mask=row < read_end, other=0.0)[:, None]

    bits = magnitude_bits(values)
    stored = (row < end)[:, None] & (col < cols)[None, :]
    if BLOCK:
        scale = kernel_scale(tl.max(tl.max(bits, axis=1), axis=0), POWER_OF_TWO)
        encoded = kernel_encode(values, scale)
        encoded_t = encoded
        tl.store(scales + (matrix * bands + band) * tiles + tile, scale)
        tl.store(scales_t + (matrix * tiles + tile) * bands + band, scale)
    else:
        # The scales of both sides in one tensor: the compiler then gives each thread few of them. Alone,
        # those of the columns would be worked out by every thread that holds a part of the column.
        both = kernel_scale(tl.join(tl.max(bits, axis=1), tl.max(bits, axis=0)), POWER_OF_TWO)
        scale, scale_t = tl.split(both)
        inverse, inverse_t = tl.split(tl.div_rn(1.0, both))
        encoded_t = (values * inverse_t[None, :]).to(tl.float8e4nv)
        tl.store(scales_t + col.to(tl.int64) * bands + band, scale_t, mask=(col < cols) & (band < bands))
        if codes is not None:
            encoded = (values * inverse[:, None]).to(tl.float8e4nv)
            tl.store(scales + row_start * tiles + local * tiles + tile, scale, mask=row < end)
    if codes is not None:
        at = codes + (matrix * rows + row_start) * cols + tile * 128
        tl.store(at + local[:, None] * cols + index[None, :], encoded, mask=stored)
    encoded_t = tl.reshape(tl.permute(tl.reshape(encoded_t, (8, 16, 128)), (2, 1, 0)), (128, 128))
    at = codes_t + (matrix * cols + tile * 128) * width + band * 128
    stored_t = (col < cols)[:, None] & (band * 128 + index < width)[None, :]
    tl.store(at + index[:, None] * width + index[None, :], encoded_t, mask=stored_t)


@jit
def _expert_rows(offsets, band, rows, experts, EXPERTS: tl.constexpr):
    """First row of the `band`-th group of 128, end of the rows to read, and end of the rows to write.

    The groups of the rows that belong to no expert come last: these are written as zeros and not read.
    """
    index = tl.arange(0, EXPERTS)
    lower = tl.load(offsets + index, mask=index < experts, other=0).to(tl.int32)
    upper = tl.load(offsets + index + 1, mask=index < experts, other=0).to(tl.int32)
    groups = tl.cdiv(upper - lower, 128)
    before = (tl.cumsum(groups, 0) <= band) & (index < experts)
    expert = tl.sum(before.to(tl.int32), axis=0)
    first = band - tl.sum(tl.where(before, groups, 0), axis=0)
    first = tl.load(offsets + expert).to(tl.int32) + first * 128
    end = tl.load(offsets + expert + 1, mask=expert < experts, other=rows).to(tl.int32)
    end = tl.minimum(end, rows)
    return first, tl.where(expert < experts, end, 0), end


@jit
def _load_e5m6(words, local, tile, valid, cols, stride_row):
    """Values [128, 128] of packed E5M6 codes: eight of them are three words of 32 bits, lowest bits first."""
    eight = tl.arange(0, 16)
    at = words + local[:, None] * stride_row + 3 * eight[None, :]
    mask = valid[:, None] & (tile * 128 + 8 * eight < cols)[None, :]
    low = tl.load(at, mask=mask, other=0)
    middle = tl.load(at + 1, mask=mask, other=0)
    high = tl.load(at + 2, mask=mask, other=0)
    # Bits 15 to 4 of each are a code, in the place where an FP16 has it.
    even = tl.interleave(
        tl.interleave(low << 4, middle >> 12), tl.interleave((low >> 20 & 0xFF0) | middle << 12, high >> 4)
    )
    odd = tl.interleave(
        tl.interleave(low >> 8, (middle >> 24 & 0xF0) | high << 8), tl.interleave(middle, high >> 16)
    )
    codes = tl.interleave(even, odd) & 0xFFF0
    return codes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
