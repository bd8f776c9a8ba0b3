"""The kernel that quantises a matrix along both of its sides at once: `transpose.py` launches it.

One program owns a square of 128x128 values, reads it once and writes the codes along its rows, along its
columns (transposed), or both. So every scale is found within one program.

    x         values (FP32, BF16), or FP8 codes with `x_scales` of 1x128 tiles, or E5M6 words
    offsets   rows belong to experts: squares start anew at each expert's first row

No value changes threads. A thread holds a patch of 8 x 8 or 16 x 8 values: a load for each of its rows, then
a store of codes for each row, and one for each column. Four neighbouring lanes read 128 bytes of a row (BF16)
and fill 32 bytes of its codes; eight lanes fill 64 or 128 bytes along a column. So shared memory carries
maxima and scales only. Patches are numbered along one dimension, lowest bits first: four across, all down,
four across; the compiler deals them out to lanes and then to warps in this order, whatever its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernels.backend import jit, tl
from kernels.formats.e5m6 import kernel_decode
from kernels.formats.quantize import TILE, kernel_scale, magnitude_bits


@dataclass(frozen=True)
class Patches:
    """A launch shape: patches of `rows` x 8 values, one for each thread."""

    rows: int
    options: dict[str, Any]


# Without fusion every operation rounds on its own, as in the reference. Measured on an H200, in microseconds:
#
#     function              shape             8x8      16x8
#     quantize_both         4096 x 7168      45.2      50.2   maxima of rows and of columns: more registers
#     quantize_tokens_both  32768 x 4096    191.5     190.1
#     quantize_blocks_both  24576 x 1536     45.8      43.1
#     requantize_transpose  4096 x 7168      32.2      29.7   FP8
#     requantize_transpose  4096 x 16384     76.5      62.0   E5M6
#     quantize_tokens       32768 x 4096    130.7     113.5
#     requantize_tokens     32768 x 4096    133.7     119.9
BOTH = Patches(8, {"num_warps": 8, "enable_fp_fusion": False})
# With 168 registers three programs share a multiprocessor; without a limit, quantize_blocks_both takes 44.8.
ONE = Patches(16, {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": False})
# Rows start at multiples of 16 values, in what is read and in both that are written: other sizes are padded,
# since loads and stores of single values spread a row over so many threads that the kernel spills registers.
ALIGNED = 16
LONGEST = 2**24  # columns, rows, strides: offsets inside a square are 32 bits wide
MOST = 65535  # programs along the second axis of a grid, and along the third

Parts = tuple[torch.Tensor, torch.Tensor]


def launch(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    along_rows: Parts | None,
    along_columns: Parts,
    bands: int,
    cols: int,
    *,
    block: bool = False,
    e5m6: bool = False,
    power_of_two: bool = False,
) -> None:
    """Quantise x [rows, cols] or [matrices, rows, cols] into codes and scales; `along_columns` is transposed.

    `bands` is the number of bands of 128 rows of a matrix. With `block` there is one scale for each square.

    Raises:
        ValueError: the matrix is too large.
    """
    codes, scales = along_rows or (None, None)
    codes_t, scales_t = along_columns
    if codes_t.numel() == 0:
        return
    options = {"block": block, "e5m6": e5m6, "power_of_two": power_of_two}
    width = codes_t.shape[-1]
    if cols % ALIGNED != 0 or width % ALIGNED != 0:
        whole = cols if cols % ALIGNED == 0 else -(-cols // TILE) * TILE
        tall = (
            codes_t.new_empty((*codes_t.shape[:-2], whole, -(-width // ALIGNED) * ALIGNED)),
            scales_t if block else scales_t.new_empty((whole, scales_t.shape[1])),
        )
        wide = None if codes is None else (codes.new_empty((*codes.shape[:-1], whole)), scales)
        launch(_with_columns(x, whole), x_scales, offsets, wide, tall, bands, whole, **options)
        if wide is not None:
            codes.copy_(wide[0][..., :cols])
        codes_t.copy_(tall[0][..., :cols, :width])
        if not block:
            scales_t.copy_(tall[1][:cols])
        return
    matrix = x if x.dim() == 3 else x[None]
    if not (e5m6 or _lies_well(matrix)):
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    rows, strides = matrix.shape[1], matrix.stride()
    if max(rows, cols, width, strides[1]) >= LONGEST or max(bands, matrix.shape[0]) > MOST:
        raise ValueError(
            f"quantisation along both sides: a matrix of {rows} x {cols} with row stride {strides[1]}; "
            f"sizes from {LONGEST} on, and more than {MOST} bands of {TILE} rows, are not supported: split it"
        )
    experts = 0 if offsets is None else offsets.numel() - 1
    patches = patches_for(both=codes is not None, block=block)
    with torch.cuda.device_of(x):
        square_kernel[(-(-cols // TILE), bands, matrix.shape[0])](
            matrix, x_scales, offsets, codes, scales, codes_t, scales_t,
            rows, cols, width, experts, *strides,
            BLOCK=block, E5M6=e5m6, POWER_OF_TWO=power_of_two, EXPERTS=experts_range(experts),
            ROWS=patches.rows, **patches.options,
        )  # fmt: skip


def patches_for(*, both: bool, block: bool) -> Patches:
    """The launch shape for codes along `both` sides or columns alone, scales of tiles or of a `block`."""
    return BOTH if both and not block else ONE


def fits(x: torch.Tensor) -> bool:
    """Whether `launch` takes a matrix, and writes its transpose, as they lie: without a copy."""
    sizes = (*x.shape, x.stride(0))
    return _lies_well(x) and all(size % ALIGNED == 0 and size < TILE * MOST for size in sizes)


def _lies_well(x: torch.Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 values."""
    return x.stride(-1) == 1 and not any(one % ALIGNED for one in (*x.stride()[:-1], x.data_ptr()))


def _with_columns(x: torch.Tensor, cols: int) -> torch.Tensor:
    """Values, FP8 codes or words with zero columns added up to `cols`."""
    if x.shape[-1] == cols or x.dtype == torch.int32:  # E5M6 is never padded: its rows are whole words
        return x
    plain = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
    return torch.nn.functional.pad(plain, (0, cols - x.shape[-1])).view(x.dtype)


def experts_range(experts: int) -> int:
    """Length of the vector, a power of two of at least 32, in which a program reads all offsets.

    Never 128: with that the largest tile of the grouped GEMM spills registers.
    """
    length = 1 << max(experts - 1, 31).bit_length()
    return 256 if length == 128 else length


# Knowing that there is one row, Triton (3.6, 3.7) leaves code on which ptxas crashes.
@jit(do_not_specialize=("rows", "experts"))
def square_kernel(
    x, x_scales, offsets, codes, scales, codes_t, scales_t,
    rows, cols, width, experts, stride_matrix, stride_row, stride_col,
    BLOCK: tl.constexpr, E5M6: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: one square, in patches of ROWS x 8.

    `x_scales`, `offsets`, and both of `codes` and `scales` may be None.
    """
    HIGH: tl.constexpr = 128 // ROWS  # patches one above the other
    tiles = tl.cdiv(cols, 128)
    bands = tl.cdiv(width, 128)
    tile = tl.program_id(0)
    band = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    if offsets is None:
        first = band * 128
        read_end = rows
        end = rows
    else:
        first, read_end, end = _expert_rows(offsets, band, rows, experts, EXPERTS)
    row_start = first.to(tl.int64)
    left = cols - tile * 128

    # Addresses are a thread's own part plus a part that all threads share, which costs them nothing.
    patch = tl.arange(0, 16 * HIGH)
    row, col = _corner(patch, HIGH, ROWS)
    readable = tl.where(col < left, read_end - first - row, 0)  # rows of the patch
    eight = tl.arange(0, 8)[None, :]
    x += matrix * stride_matrix + row_start * stride_row
    if E5M6:
        at = x + tile * 48 + (row * stride_row + col // 8 * 3)
    else:
        at = (x + tile.to(tl.int64) * 128 * stride_col + row * stride_row)[:, None]
        at += (col[:, None] + eight) * stride_col
    if x_scales is not None:
        x_scales += row_start * tiles + tile + row * tiles
    # Row by row, so that the magnitudes of few values wait in registers.
    kept = ()
    row_maxima = ()
    column_maxima = None
    for step in tl.static_range(ROWS):
        if E5M6:
            values = _load_e5m6(at + step * stride_row, step < readable)
        else:
            values = tl.load(at + step * stride_row, mask=(step < readable)[:, None], other=0.0)
            values = values.to(tl.float32)
        if x_scales is not None:
            x_scale = tl.load(x_scales + step * tiles, mask=step < readable, other=0.0)
            values = values * x_scale[:, None]
        bits = magnitude_bits(values)
        row_maxima += (tl.max(bits, axis=1),)
        column_maxima = bits if step == 0 else tl.maximum(column_maxima, bits)
        kept += (values,)

    column_max = tl.max(tl.reshape(column_maxima, (4, HIGH, 4, 8)), axis=1)
    if BLOCK:
        scale = kernel_scale(tl.max(tl.reshape(column_max, (128,)), axis=0), POWER_OF_TWO)
        inverse_t = tl.div_rn(1.0, scale)
        tl.store(scales + (matrix * bands + band) * tiles + tile, scale)
        tl.store(scales_t + (matrix * tiles + tile) * bands + band, scale)
    else:
        line = tl.arange(0, 128)
        if codes is None:
            scale_t = kernel_scale(_once(tl.reshape(column_max, (4, 32))), POWER_OF_TWO)
            inverse_t = tl.div_rn(1.0, scale_t)
        else:
            row_max = tl.max(tl.reshape(_joined(row_maxima), (4, HIGH, 4, ROWS)), axis=2)
            row_max = tl.reshape(tl.max(row_max, axis=0), (128,))
            both = _once(tl.reshape(tl.join(row_max, tl.reshape(column_max, (128,))), (8, 32)))
            both = kernel_scale(both, POWER_OF_TWO)
            scale, scale_t = tl.split(tl.reshape(both, (128, 2)))
            inverse, inverse_t = tl.split(tl.reshape(tl.div_rn(1.0, both), (128, 2)))
            inverses = tl.broadcast_to(tl.reshape(inverse, (1, HIGH, 1, ROWS)), (4, HIGH, 4, ROWS))
            inverses = _parted(tl.reshape(inverses, (16 * HIGH, ROWS)), ROWS)
            tl.store(scales + (row_start + line) * tiles + tile, scale, mask=line < end - first)
        inverse_t = tl.broadcast_to(tl.reshape(inverse_t, (4, 1, 4, 8)), (4, HIGH, 4, 8))
        inverse_t = tl.reshape(inverse_t, (16 * HIGH, 8))
        at_t = scales_t + (tile * 128 + line).to(tl.int64) * bands + band
        tl.store(at_t, tl.reshape(scale_t, (128,)), mask=(line < left) & (band < bands))

    if codes is not None:
        writable = tl.where(col < left, end - first - row, 0)
        at = (codes + (matrix * rows + row_start) * cols + tile * 128 + (row * cols + col))[:, None] + eight
        for step in tl.static_range(ROWS):
            scaled = kept[step] * (inverse_t if BLOCK else inverses[step][:, None])
            tl.store(at + step * cols, scaled.to(tl.float8e4nv), mask=(step < writable)[:, None])
    scaled_t = ()
    for step in tl.static_range(ROWS):
        scaled_t += (kept[step] * inverse_t,)
    encoded_t = tl.reshape(_joined(scaled_t).to(tl.float8e4nv), (4, HIGH, 4, 8, ROWS))
    encoded_t = tl.reshape(tl.permute(encoded_t, (3, 0, 1, 2, 4)), (128 * HIGH, ROWS))
    strip = tl.arange(0, 128 * HIGH)  # a column of a patch, numbered like patches, then along the row
    row, col = _corner(strip % (16 * HIGH), HIGH, ROWS)
    token = row[:, None] + tl.arange(0, ROWS)[None, :]
    at = codes_t + (matrix * cols + tile * 128) * width + band * 128 + col * width
    at = at[:, None] + token + (strip // (16 * HIGH) * width)[:, None]
    tl.store(at, encoded_t, mask=(col < left)[:, None] & (token < width - band * 128))


@jit
def _corner(patch, HIGH: tl.constexpr, ROWS: tl.constexpr):
    """First row and column, within the square, of patches by their numbers."""
    return patch // 4 % HIGH * ROWS, (patch % 4 + patch // (4 * HIGH) * 4) * 8


@jit
def _once(values):
    """The same values [n, 32], each in one thread: after a maximum all threads of a row or column hold it,
    and all would work out its scale. A gather makes the compiler deal them out."""
    return tl.gather(values, tl.broadcast_to(tl.arange(0, 32)[None, :], values.shape), 1)


@jit
def _joined(parts):
    """2**n tensors as one, n dimensions of 2 added: the last is the lowest bit of a tensor's number."""
    if len(parts) == 2:
        return tl.join(parts[0], parts[1])
    else:
        return tl.join(_joined(parts[0::2]), _joined(parts[1::2]))


@jit
def _parted(values, COUNT: tl.constexpr):
    """The columns of values [n, COUNT], each [n]."""
    even, odd = tl.split(tl.reshape(values, (values.shape[0], COUNT // 2, 2)))
    if COUNT == 2:
        return (tl.reshape(even, (values.shape[0],)), tl.reshape(odd, (values.shape[0],)))
    else:
        evens = _parted(even, COUNT // 2)
        odds = _parted(odd, COUNT // 2)
        columns = ()
        for index in tl.static_range(COUNT // 2):
            columns += (evens[index], odds[index])
        return columns


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
def _load_e5m6(words, mask):
    """Values [n, 8] of packed E5M6 codes at words [n]: eight of them are three words, lowest bits first."""
    low = tl.load(words, mask=mask, other=0)
    middle = tl.load(words + 1, mask=mask, other=0)
    high = tl.load(words + 2, mask=mask, other=0)
    return tl.reshape(kernel_decode(low, middle, high), (words.shape[0], 8))
