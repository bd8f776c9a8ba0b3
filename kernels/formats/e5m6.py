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
that its code is zero either way), and the rest is arithmetic on integers and one IEEE addition. So the
reference and the kernel agree bit for bit. The rules at the edges are those of `kernels.formats.quantize`: a
tile of zeros has scale 1 and keeps its signs, the smallest scale is 2**-126, and a tile that holds a NaN or
an infinity gets scale NaN and all codes NaN. Values above (2 - 2**-7) * 2**127 round up to 2**128 and come
back as infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.quantize import TILE, check_scales, check_types

NAN_CODE = 0x7E0
EIGHT_BITS = 0x41000000  # 8.0
TINY_BITS = 113 << 23  # 2**-14: codes of smaller values are subnormal

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
    """Quantise a matrix [rows, cols] (FP32 or BF16, any strides) in 1x128 tiles.

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
    packed = torch.empty((rows, 3 * ((cols + 1) // 2)), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, -(-cols // TILE)), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        grid = (-(-rows // ROWS), scales.shape[1])
        with torch.cuda.device_of(x):
            quantize_kernel[grid](
                x, _words(packed, cols), scales, rows, cols, x.stride(0), x.stride(1),
                WORDS=_has_words(cols), ROWS=ROWS, **OPTIONS,
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
                _words(q.packed, cols), q.scales, out, rows, cols,
                WORDS=_has_words(cols), ROWS=ROWS, **OPTIONS,
            )  # fmt: skip
    return out


def _has_words(cols: int) -> bool:
    """Whether a row is whole words of 32 bits. Three of them hold eight codes; moving bytes takes four times
    as many instructions."""
    return cols % 8 == 0


def _words(packed: torch.Tensor, cols: int) -> torch.Tensor:
    return packed.view(torch.int32) if _has_words(cols) else packed


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
    x, packed, scales, rows, cols, stride_row, stride_col,
    WORDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one column of tiles. `packed` are words (int32) if WORDS, else bytes."""
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tile.to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    values = tl.load(x + row[:, None] * stride_row + col[None, :] * stride_col, mask=inside, other=0.0)
    values = values.to(tl.float32)
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = (amax >> 23) - 15 + ((amax & 0x7FFFFF) > 0x7E0000).to(tl.int32)
    exponent = tl.where(amax == 0, 127, tl.maximum(exponent, 1))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    codes = kernel_encode(values * inverse[:, None])
    codes = tl.where((amax < 0x7F800000)[:, None], codes, 0x7E0)  # NAN_CODE
    # Padding in the last word belongs to no column: it is zero even where the tile is NaN.
    codes = tl.where(inside, codes, 0)
    first, second = tl.split(tl.reshape(codes, (ROWS, 64, 2)))
    pairs = first | second << 12
    if WORDS:
        group = tile.to(tl.int64) * 16 + tl.arange(0, 16)
        at = packed + row[:, None] * (cols // 8 * 3) + 3 * group[None, :]
        stored = (row < rows)[:, None] & (group < cols // 8)[None, :]
        even, odd = tl.split(tl.reshape(pairs, (ROWS, 16, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        tl.store(at, first | second << 24, mask=stored)
        tl.store(at + 1, second >> 8 | third << 16, mask=stored)
        tl.store(at + 2, third >> 16 | fourth << 8, mask=stored)
    else:
        pair = tile.to(tl.int64) * 64 + tl.arange(0, 64)
        count = (cols + 1) // 2
        at = packed + row[:, None] * (3 * count) + 3 * pair[None, :]
        stored = (row < rows)[:, None] & (pair < count)[None, :]
        for byte in tl.static_range(3):
            tl.store(at + byte, (pairs >> 8 * byte & 0xFF).to(tl.uint8), mask=stored)
    scale = tl.where(amax < 0x7F800000, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    tl.store(scales + row * tl.cdiv(cols, 128) + tile, scale, mask=row < rows)


@jit
def dequantize_kernel(packed, scales, out, rows, cols, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS rows of one column of tiles. `packed` are words (int32) if WORDS, else bytes."""
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if WORDS:
        group = tile.to(tl.int64) * 16 + tl.arange(0, 16)
        at = packed + row[:, None] * (cols // 8 * 3) + 3 * group[None, :]
        loaded = (row < rows)[:, None] & (group < cols // 8)[None, :]
        low = tl.load(at, mask=loaded, other=0)
        middle = tl.load(at + 1, mask=loaded, other=0)
        high = tl.load(at + 2, mask=loaded, other=0)
        # What lies beyond the 24 bits of a pair is dropped below.
        second, third = (low >> 24 & 0xFF) | middle << 8, (middle >> 16 & 0xFFFF) | high << 16
        pairs = tl.interleave(tl.interleave(low, third), tl.interleave(second, high >> 8))
    else:
        pair = tile.to(tl.int64) * 64 + tl.arange(0, 64)
        count = (cols + 1) // 2
        at = packed + row[:, None] * (3 * count) + 3 * pair[None, :]
        loaded = (row < rows)[:, None] & (pair < count)[None, :]
        low = tl.load(at, mask=loaded, other=0).to(tl.int32)
        middle = tl.load(at + 1, mask=loaded, other=0).to(tl.int32)
        high = tl.load(at + 2, mask=loaded, other=0).to(tl.int32)
        pairs = low | middle << 8 | high << 16
    codes = tl.interleave(pairs & 0xFFF, pairs >> 12 & 0xFFF)
    values = (codes << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.load(scales + row * tl.cdiv(cols, 128) + tile, mask=row < rows, other=0.0)
    col = tile.to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    result = (values * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * cols + col[None, :], result, mask=inside)


@jit
def kernel_encode(values):
    """`_encode` in Triton."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - (112 << 6)
    subnormal = (tl.abs(values) + 8.0).to(tl.int32, bitcast=True) - 0x41000000
    return tl.where(magnitude < (113 << 23), subnormal, normal) | ((bits >> 20) & 0x800)
