"""E5M6 quantisation in packed 12-bit codes, for the cached output of attention (DeepSeek-V3 report, 3.3.3).

The output of attention is kept for the backward pass of the projection after it, where E4M3 loses too much.
The report gives it 12 bits and scales that are powers of two. Torch has no such type; this file defines one.

    code    sign (bit 11), exponent (bits 10-6, bias 15), fraction (bits 5-0): the upper 12 bits of an FP16
    values  subnormals are multiples of 2**-20; the largest value is 65024 = (2 - 2**-6) * 2**15
    NaN     exponent 31; 0x7E0 is the only such code that is written. There is no code for infinity in
            what is written: the pattern 0x7C0 would read back as infinity, so damage surfaces too.
    scale   of 1x128 values: the smallest power of two with amax / scale <= 65024, kept in FP32
    packed  columns 2i and 2i+1, codes a and b, are three bytes at 3i: the 24-bit word a | b << 12, lowest
            byte first. With an odd number of columns the last b is zero.

Values are rounded to nearest even, once: dividing by a power of two is exact (or the quotient is so small
that its code is zero either way), and the rest is arithmetic on integers and one IEEE addition. The reference
rounds normal codes as integers and the kernel rounds all by its addition; of every magnitude up to 65024, all
tried, the two make the same code. So they agree bit for bit.

The rules at the edges are those of `kernels.formats.quantize`: a tile of zeros has scale 1 and keeps its
signs, the smallest scale is 2**-126, and a tile that holds a NaN or an infinity gets scale NaN and all codes
NaN. Values above (2 - 2**-7) * 2**127 round up to 2**128 and come back as infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.quantize import TILE, check_scales, check_types

NAN_CODE = 0x7E0
EIGHT_BITS = 0x41000000  # 8.0
TINY_BITS = 113 << 23  # 2**-14: codes of smaller values are subnormal

EIGHT = 8  # values in three words of 32 bits
PART = 32  # values in three times 16 bytes
ROWS = 32  # rows of 128 values that one program takes
# Without fusion every operation rounds on its own, as in the reference.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True)
class E5M6:
    """A matrix [rows, cols] in E5M6: `packed` bytes [rows, 3 * ceil(cols / 2)] (uint8) and FP32 `scales`
    [rows, ceil(cols / 128)]. Both tensors are contiguous.

    Raises:
        ValueError, TypeError: the parts do not fit together.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    cols: int

    def __post_init__(self) -> None:
        check_types("E5M6", "packed bytes", self.packed, self.scales, torch.uint8)
        _check_packed("E5M6", self.packed, self.cols)
        expected = (self.packed.shape[0], -(-self.cols // TILE))
        described = f"a matrix {tuple(self.shape)} in 1x128 tiles needs"
        check_scales("E5M6", "packed bytes", self.packed, self.scales, expected, described)

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        return torch.Size((self.packed.shape[0], self.cols))


def quantize_e5m6(x: torch.Tensor) -> E5M6:
    """Quantise a matrix [rows, cols] (FP32 or BF16; one without unit stride along rows costs a copy) in 1x128
    tiles.

    Raises:
        TypeError, ValueError: `x` is not an FP32 or BF16 matrix.
        RuntimeError: `x` is on a GPU that the kernels do not support.
    """
    if x.dim() != 2:
        raise ValueError(f"quantize_e5m6: the tensor has shape {tuple(x.shape)}; pass a matrix [rows, cols]")
    _check_dtype("quantize_e5m6: the tensor", x.dtype)
    return quantize_e5m6_triton(x) if runs_triton(x) else quantize_e5m6_reference(x)


def dequantize_e5m6(q: E5M6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [rows, cols] that `q` stands for: FP32 products of value and scale, then cast to `dtype`.

    Raises:
        TypeError: `dtype` is neither FP32 nor BF16.
        RuntimeError: `q` is on a GPU that the kernels do not support.
    """
    _check_dtype("dequantize_e5m6: dtype", dtype)
    return dequantize_e5m6_triton(q, dtype) if runs_triton(q.packed) else dequantize_e5m6_reference(q, dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, cols] (any integer type, 0 to 4095) as bytes [rows, 3 * ceil(cols / 2)]. Runs in PyTorch.

    Raises:
        TypeError, ValueError: the codes are not a matrix of integers. Bits above the lowest 12 are dropped.
    """
    if codes.dim() != 2:
        raise ValueError(f"pack: codes have shape {tuple(codes.shape)}; pass a matrix [rows, cols]")
    if codes.dtype.is_floating_point or codes.dtype.is_complex:
        raise TypeError(f"pack: codes are {codes.dtype}; pass integers")
    even = torch.nn.functional.pad(codes.int() & 0xFFF, (0, codes.shape[1] % 2))
    first, second = even[:, 0::2], even[:, 1::2]
    parts = (first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4)
    return torch.stack(parts, dim=2).to(torch.uint8).view(codes.shape[0], 3 * first.shape[1])


def unpack(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """The codes (int32 [rows, cols]) of packed bytes. Runs in PyTorch.

    Raises:
        ValueError: the shape of `packed` does not belong to `cols` columns.
    """
    _check_packed("unpack", packed, cols)
    parts = packed.int().view(packed.shape[0], (cols + 1) // 2, 3).unbind(dim=2)
    codes = torch.stack((parts[0] | (parts[1] & 0xF) << 8, parts[1] >> 4 | parts[2] << 4), dim=2)
    return codes.view(packed.shape[0], 2 * ((cols + 1) // 2))[:, :cols].contiguous()


def quantize_e5m6_reference(x: torch.Tensor) -> E5M6:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""
    rows, cols = x.shape
    tiles = -(-cols // TILE)
    values = torch.nn.functional.pad(x.float().contiguous(), (0, tiles * TILE - cols))
    values = values.view(rows, tiles, TILE)
    amax = (values.view(torch.int32) & 0x7FFFFFFF).amax(dim=2)
    exponent = (amax >> 23) - 15 + ((amax & 0x7FFFFF) > 0x7E0000).int()
    exponent = torch.where(amax == 0, 127, exponent.clamp(min=1)).int()
    spoiled = amax >= 0x7F800000
    # Two powers of two multiply to 1: the product below is the quotient, and exact.
    quotients = values * ((254 - exponent) << 23).view(torch.float32)[:, :, None]
    codes = torch.where(spoiled[:, :, None], NAN_CODE, _encode(quotients))
    scales = torch.where(spoiled, torch.nan, (exponent << 23).view(torch.float32))
    return E5M6(pack(codes.view(rows, tiles * TILE)[:, :cols]), scales, cols)


def dequantize_e5m6_reference(q: E5M6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""
    # A code is the upper part of an FP16, sign included.
    values = (unpack(q.packed, q.cols) << 4).to(torch.int16).view(torch.float16).float()
    return (values * q.scales.repeat_interleave(TILE, dim=1)[:, : q.cols]).to(dtype)


def quantize_e5m6_triton(x: torch.Tensor) -> E5M6:
    """The Triton kernel: what `quantize_e5m6` runs on a GPU."""
    rows, cols = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    packed = torch.empty((rows, 3 * ((cols + 1) // 2)), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, -(-cols // TILE)), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        grid = (-(-rows // ROWS), scales.shape[1])
        with torch.cuda.device_of(x):
            quantize_kernel[grid](
                x, packed.view(torch.int32) if cols % PART == 0 else packed, scales,
                rows, cols, cols // 8 * 3, x.stride(0), WORDS=cols % PART == 0, ROWS=ROWS, **OPTIONS,
            )  # fmt: skip
    return E5M6(packed, scales, cols)


def dequantize_e5m6_triton(q: E5M6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The Triton kernel: what `dequantize_e5m6` runs on a GPU."""
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    rows, cols = q.shape
    if out.numel() > 0:
        grid = (-(-rows // ROWS), q.scales.shape[1])
        with torch.cuda.device_of(out):
            dequantize_kernel[grid](
                q.packed.view(torch.int32) if cols % EIGHT == 0 else q.packed, q.scales, out, rows, cols,
                WORDS=cols % EIGHT == 0, ROWS=ROWS, **OPTIONS,
            )  # fmt: skip
    return out


def _encode(values: torch.Tensor) -> torch.Tensor:
    """Codes (int32) of FP32 numbers of at most 65024: to nearest, ties to even."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0xFFFF + (magnitude >> 17 & 1) >> 17) - (112 << 6)
    # Below 2**-14 the addition of 8 rounds to multiples of 2**-20 and leaves their number in the lowest bits.
    subnormal = (values.abs() + 8.0).view(torch.int32) - EIGHT_BITS
    return torch.where(magnitude < TINY_BITS, subnormal, normal) | (bits >> 20 & 0x800)


def _check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{what} is {dtype}; use torch.float32 or torch.bfloat16")


def _check_packed(function: str, packed: torch.Tensor, cols: int) -> None:
    if packed.dim() != 2 or cols < 0 or packed.shape[1] != 3 * ((cols + 1) // 2):
        raise ValueError(
            f"{function}: packed has shape {tuple(packed.shape)}; {cols} columns "
            f"need [rows, {3 * ((max(cols, 0) + 1) // 2)}]"
        )


@jit
def quantize_kernel(
    x, packed, scales, rows, cols, words, stride_row,
    WORDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one column of tiles. `packed` are `words` words (int32) a row, or bytes."""
    tile = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = _eights(ROWS)
    eight = tl.arange(0, 8)[None, :]
    # Rows and columns from the first of this program on: 32 bits are enough for them, and take half the time.
    height, width = tl.minimum(rows - first, ROWS).to(tl.int32), cols - tile * 128
    inside = (row < height)[:, None] & (col[:, None] + eight < width)
    at = x + first * stride_row + tile * 128
    values = tl.load(at + (row * stride_row + col)[:, None] + eight, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    amax = tl.max(tl.reshape(amax, (ROWS, 16)), axis=1)
    exponent = (amax >> 23) - 15 + ((amax & 0x7FFFFF) > 0x7E0000).to(tl.int32)
    exponent = tl.where(amax == 0, 127, tl.maximum(exponent, 1))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    codes = kernel_encode(values * _sixteen_times(inverse)[:, None])
    if not WORDS:  # padding in the last word belongs to no column: it is zero even where the tile is NaN
        codes = tl.where(inside, codes, 0)
    even, odd = tl.split(tl.reshape(codes, (16 * ROWS, 4, 2)))
    pairs = even | odd << 12
    finite = _sixteen_times(amax)[:, None] < 0x7F800000
    if WORDS:
        pairs = tl.where(finite, pairs, 0x7E07E0)  # NAN_CODE twice
        even, odd = tl.split(tl.reshape(pairs, (16 * ROWS, 2, 2)))
        first_pair, third = tl.split(even)
        second, fourth = tl.split(odd)
        # A thread takes the twelve words of four eights, to store 16 bytes at a time: words that lie three
        # apart would go to memory in three pieces of a sector each.
        a0, a1, a2, a3 = _columns(first_pair | second << 24, ROWS)
        b0, b1, b2, b3 = _columns(second >> 8 | third << 16, ROWS)
        c0, c1, c2, c3 = _columns(third >> 16 | fourth << 8, ROWS)
        part = tl.arange(0, 4 * ROWS)
        at = packed + first * words + tile * 48 + (part // 4 * words + part % 4 * 12)
        at = at[:, None] + tl.arange(0, 4)[None, :]
        stored = ((part // 4 < height) & (part % 4 * 32 < width))[:, None]
        tl.store(at, tl.reshape(tl.join(tl.join(a0, c0), tl.join(b0, a1)), at.shape), mask=stored)
        tl.store(at + 4, tl.reshape(tl.join(tl.join(b1, a2), tl.join(c1, b2)), at.shape), mask=stored)
        tl.store(at + 8, tl.reshape(tl.join(tl.join(c2, b3), tl.join(a3, c3)), at.shape), mask=stored)
    else:
        pair = (col // 2)[:, None] + tl.arange(0, 4)[None, :]
        nan = tl.where(2 * pair + 1 < width, 0x7E07E0, 0x7E0)
        pairs = tl.where(finite, pairs, nan)
        count = (cols + 1) // 2
        at = packed + first * (3 * count) + tile * 192 + (row[:, None] * (3 * count) + 3 * pair)
        stored = (row < height)[:, None] & (2 * pair < width)
        for byte in tl.static_range(3):
            tl.store(at + byte, (pairs >> 8 * byte & 0xFF).to(tl.uint8), mask=stored)
    scale = tl.where(amax < 0x7F800000, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    row = tl.arange(0, ROWS)
    tl.store(scales + (first + row) * tl.cdiv(cols, 128) + tile, scale, mask=row < height)


@jit
def dequantize_kernel(packed, scales, out, rows, cols, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS rows of one column of tiles. `packed` are words (int32) if WORDS, else bytes."""
    tile = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = _eights(ROWS)
    height, width = tl.minimum(rows - first, ROWS).to(tl.int32), cols - tile * 128
    if WORDS:
        at = packed + first * (cols // 8 * 3) + tile * 48 + (row * (cols // 8 * 3) + col // 8 * 3)
        loaded = (row < height) & (col < width)
        low = tl.load(at, mask=loaded, other=0)
        middle = tl.load(at + 1, mask=loaded, other=0)
        high = tl.load(at + 2, mask=loaded, other=0)
        values = kernel_decode(low, middle, high)
    else:
        pair = (col // 2)[:, None] + tl.arange(0, 4)[None, :]
        count = (cols + 1) // 2
        at = packed + first * (3 * count) + tile * 192 + (row[:, None] * (3 * count) + 3 * pair)
        loaded = (row < height)[:, None] & (2 * pair < width)
        low = tl.load(at, mask=loaded, other=0).to(tl.int32)
        middle = tl.load(at + 1, mask=loaded, other=0).to(tl.int32)
        high = tl.load(at + 2, mask=loaded, other=0).to(tl.int32)
        values = _numbers(tl.interleave(low << 4 | middle << 12, middle | high << 8))
    tiles = tl.cdiv(cols, 128)
    scale = tl.load(scales + first * tiles + tile + row * tiles, mask=row < height, other=0.0)
    columns = col[:, None] + tl.arange(0, 8)[None, :]
    result = (values * scale[:, None]).to(out.dtype.element_ty)
    at = out + first * cols + tile * 128 + ((row * cols)[:, None] + columns)
    tl.store(at, result, mask=(row < height)[:, None] & (columns < width))


@jit
def kernel_encode(values):
    """`_encode` in Triton, both of its cases in one addition: |value| plus the power of two whose last place
    is that of the code rounds to nearest even, and leaves the code's fraction, with its first bit, below."""
    bits = values.to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, 113 << 23) + (17 << 23)  # TINY_BITS
    rounded = (tl.abs(values) + power.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    # Added to it is 64 times the exponent of the code, less 1: the first bit of the fraction is that 1.
    return (rounded - power + (power >> 17) - (130 << 6)) | ((bits >> 20) & 0x800)


@jit
def kernel_decode(low, middle, high):
    """FP32 values [n, 8] of eight codes in each three words [n] of 32 bits."""
    # Bits 15 to 4 of each are a code, in the place where an FP16 has it.
    even = tl.join(tl.join(low << 4, middle >> 12), tl.join((low >> 20 & 0xFF0) | middle << 12, high >> 4))
    odd = tl.join(tl.join(low >> 8, (middle >> 24 & 0xF0) | high << 8), tl.join(middle, high >> 16))
    return _numbers(tl.reshape(tl.join(even, odd), (low.shape[0], 8)))


@jit
def _numbers(codes):
    """FP32 values of codes in bits 15 to 4, whatever the other bits hold."""
    return (codes & 0xFFF0).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _eights(ROWS: tl.constexpr):
    """Row and first column of each eight values of ROWS x 128, [16 * ROWS].

    Along one dimension, neighbouring lanes take neighbouring eights of a row. Of two dimensions without
    neighbouring addresses, such as words three apart, the compiler may choose the other for its lanes.
    """
    eight = tl.arange(0, 16 * ROWS)
    return eight // 16, eight % 16 * 8


@jit
def _columns(words, ROWS: tl.constexpr):
    """Words [16 * ROWS] of four neighbouring eights, each [4 * ROWS]."""
    even, odd = tl.split(tl.reshape(words, (4 * ROWS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@jit
def _sixteen_times(values):
    """What belongs to a row of 128 values, for each eight of them: [rows] to [16 * rows]."""
    return tl.reshape(tl.broadcast_to(values[:, None], (values.shape[0], 16)), (values.shape[0] * 16,))
