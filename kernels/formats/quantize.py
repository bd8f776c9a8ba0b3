"""FP8 E4M3 quantisation with fine-grained scales (DeepSeek-V3 report, section 3.3.2).

One scale covers 1x128 values of an activation (one token, 128 channels) or 128x128 values of a weight, so
one outlier costs precision only to its own tile. Scales come from the tensor at hand (no delayed scaling):

    scale   = amax / 448                FP32, or rounded up to a power of two (UE8M0) with `power_of_two=True`
    inverse = 1 / scale                 FP32, once a tile: a value then costs a product, not a division
    code    = e4m3(value * inverse)     round to nearest even

Every step is one correctly rounded FP32 operation, so the reference and the kernel agree bit for bit. Against
a division the product may differ in its last bit, and a code next to a midpoint by one; with powers of two
both are exact. No product exceeds 448 by more than three roundings (448.0001), which E4M3 rounds to 448:
nothing needs to be clamped.

Rules at the edges:

- A tile of zeros has scale 1 and codes zero; a zero keeps its sign.
- The smallest scale is 2**-126, the smallest normal FP32 number. It binds only for amax below 448 * 2**-126
  = 5.3e-36. There is no larger floor: the published inference code clamps amax at 1e-4, which in training
  would flush small gradients to zero.
- A tile that holds a NaN or an infinity gets scale NaN and all codes NaN: it cannot pass unnoticed.
- Last tiles may be ragged. Codes have exactly the shape of the tensor; the missing part counts as zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.backend import jit, runs_triton, tl

E4M3_MAX = 448.0
MIN_SCALE = 2.0**-126
TILE = 128
TILES = (1, TILE)
BLOCKS = (TILE, TILE)

BAND_VALUES = 2**19  # values that the references take at a time
TILE_ROWS = 32  # rows of 128 values that one program of the tile kernel quantises
# Launch options. Without fusion every operation rounds on its own, as in the reference.
TILE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8: E4M3 `codes` [rows, cols] and an FP32 scale for each block of rows and columns.

    `scales` is [ceil(rows / block[0]), ceil(cols / block[1])]. An element is its code times the scale of the
    block that it lies in. Both tensors are contiguous.

    Raises:
        ValueError, TypeError: the parts do not fit together.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        if self.block not in (TILES, BLOCKS):
            raise ValueError(f"Quantized: block is {self.block}; it must be {TILES} or {BLOCKS}")
        check_types("Quantized", "codes", self.codes, self.scales, torch.float8_e4m3fn)
        if self.codes.dim() != 2:
            raise ValueError(f"Quantized: codes have shape {tuple(self.codes.shape)}; they must be a matrix")
        expected = _scale_shape(self.codes.shape, self.block)
        described = f"codes {tuple(self.codes.shape)} in blocks of {self.block} need"
        check_scales("Quantized", "codes", self.codes, self.scales, expected, described)

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        return self.codes.shape

    def transpose(self) -> Quantized:
        """The transposed matrix, codes and scales moved, no value changed.

        Only square blocks turn into blocks of the same kind; 1x128 tiles must be dequantised, transposed and
        quantised again.

        Raises:
            ValueError: the blocks are 1x128 tiles.
        """
        if self.block != BLOCKS:
            raise ValueError(
                "Quantized.transpose: 1x128 tiles have no transpose; quantize the transposed values"
            )
        return Quantized(self.codes.t().contiguous(), self.scales.t().contiguous(), self.block)


def quantize_tiles(x: torch.Tensor, *, power_of_two: bool = False) -> Quantized:
    """Quantise a matrix [rows, cols] (FP32 or BF16, any strides) in 1x128 tiles: the grouping of activations.

    For the 128x1 grouping that the weight gradient needs, pass the transposed view: `quantize_tiles(x.t())`.

    Raises:
        TypeError, ValueError: `x` is not an FP32 or BF16 matrix.
        RuntimeError: `x` is on a GPU without FP8 support.
    """
    check_input("quantize_tiles", x)
    if runs_triton(x):
        return quantize_tiles_triton(x, power_of_two=power_of_two)
    return quantize_reference(x, TILES, power_of_two=power_of_two)


def quantize_blocks(w: torch.Tensor, *, power_of_two: bool = False) -> Quantized:
    """Quantise a matrix [rows, cols] (FP32 or BF16, any strides) in 128x128 blocks: the grouping of weights.

    Raises:
        TypeError, ValueError: `w` is not an FP32 or BF16 matrix.
        RuntimeError: `w` is on a GPU without FP8 support.
    """
    check_input("quantize_blocks", w)
    if runs_triton(w):
        return quantize_blocks_triton(w, power_of_two=power_of_two)
    return quantize_reference(w, BLOCKS, power_of_two=power_of_two)


def quantize_reference(x: torch.Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> Quantized:
    """The PyTorch reference of both quantisers, on any device: the kernels must agree with it bit for bit."""
    codes, scales = encode(lambda rows: x[rows], x.shape, block, x.device, power_of_two)
    return Quantized(codes, scales, block)


def encode(
    values_of: Callable[[slice], torch.Tensor],
    shape: torch.Size | tuple[int, int],
    block: tuple[int, int],
    device: torch.device,
    power_of_two: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, by PyTorch, of a matrix whose rows `values_of` gives, in blocks of any size.

    Band by band the steps stay within the processor's cache, and temporary tensors small.
    """
    rows, cols = shape
    codes = torch.empty((rows, cols), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(_scale_shape((rows, cols), block), dtype=torch.float32, device=device)
    band = TILE * max(1, BAND_VALUES // (TILE * max(1, cols)))
    for start in range(0, rows, band):
        at = slice(start, min(start + band, rows))
        scale_rows = slice(start // block[0], -(-at.stop // block[0]))
        # The cast is part of the copy.
        codes[at], scales[scale_rows] = _scale_band(values_of(at), block, power_of_two)
    return codes, scales


def _scale_band(
    x: torch.Tensor, block: tuple[int, int], power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values times the inverse of their scale, and the scales."""
    rows, cols = x.shape
    height, width = block
    scale_rows, scale_cols = _scale_shape(x.shape, block)
    padding = (0, scale_cols * width - cols, 0, scale_rows * height - rows)
    padded = x.float().contiguous()
    if any(padding):
        padded = torch.nn.functional.pad(padded, padding)
    blocks = padded.view(scale_rows, height, scale_cols, width)
    scales = _scales(torch.maximum(blocks.amax(dim=(1, 3)), -blocks.amin(dim=(1, 3))), power_of_two)
    values = blocks * scales.reciprocal()[:, None, :, None]
    spoiled = scales.isnan()
    if spoiled.any():
        # The NaN of a product may carry either sign; torch.nan gives the one code 0x7F on every device.
        values.masked_fill_(spoiled[:, None, :, None], torch.nan)
    return values.view(padded.shape)[:rows, :cols], scales


def quantize_tiles_triton(x: torch.Tensor, *, power_of_two: bool = False) -> Quantized:
    """The Triton kernels for 1x128 tiles: what `quantize_tiles` runs on a GPU."""
    from kernels.formats import square  # which imports this file

    codes, scales = empty_quantized(x, TILES)
    rows, cols = x.shape
    if square.fits(x.t()):
        square.launch(
            x.t(), None, None, None, (codes, scales), -(-cols // TILE), rows, power_of_two=power_of_two
        )
    elif x.numel() > 0:
        grid = (-(-rows // TILE_ROWS), scales.shape[1])
        with torch.cuda.device_of(x):
            tiles_kernel[grid](
                x, codes, scales, rows, cols, x.stride(0), x.stride(1),
                POWER_OF_TWO=power_of_two, ROWS=TILE_ROWS, **TILE_OPTIONS,
            )  # fmt: skip
    return Quantized(codes, scales, TILES)


def quantize_blocks_triton(w: torch.Tensor, *, power_of_two: bool = False) -> Quantized:
    """The Triton kernel for 128x128 blocks: what `quantize_blocks` runs on a GPU."""
    codes, scales = empty_quantized(w, BLOCKS)
    launch_blocks(w[None], codes, scales, power_of_two)
    return Quantized(codes, scales, BLOCKS)


def launch_blocks(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, power_of_two: bool) -> None:
    """Quantise matrices w [matrices, rows, cols] into `codes` and `scales`, blocks starting anew in each."""
    matrices, rows, cols = w.shape
    if w.numel() > 0:
        with torch.cuda.device_of(w):
            blocks_kernel[(matrices * -(-rows // TILE), -(-cols // TILE))](
                w, codes, scales, rows, cols, *w.stride(), POWER_OF_TWO=power_of_two, **BLOCK_OPTIONS
            )


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [rows, cols] that `q` stands for: FP32 products of code and scale, then cast to `dtype`."""
    rows, cols = q.shape
    height, width = q.block
    scales = q.scales.repeat_interleave(width, dim=1)[:, :cols]
    if height > 1:
        scales = scales.repeat_interleave(height, dim=0)[:rows]
    return (_decode(q.codes) * scales).to(dtype)


def _decode(codes: torch.Tensor) -> torch.Tensor:
    """The FP32 values of E4M3 codes, exact."""
    if codes.device.type != "cpu":
        return codes.float()
    # On a CPU a table is five times as fast as the cast, and two codes at a time nearly twice that.
    flat = codes.view(-1)
    if flat.numel() % 2 or flat.storage_offset() % 2:
        return _table(torch.uint8).index_select(0, flat.view(torch.uint8).int()).view(codes.shape)
    pairs = _table(torch.uint16).view(torch.float64).index_select(0, flat.view(torch.uint16).int())
    return pairs.view(torch.float32).view(codes.shape)


@functools.cache
def _table(kind: torch.dtype) -> torch.Tensor:
    """The FP32 values of all codes, or of all pairs of codes, in the order of their bits as integers."""
    codes = torch.arange(256**kind.itemsize, dtype=torch.int32).to(kind)
    return codes.view(torch.float8_e4m3fn).float()


def _scales(amax: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """Scales (FP32) of tiles whose largest magnitudes are `amax` (FP32; NaN where the tile holds one)."""
    if power_of_two:
        # 448 is 1.75 * 2**8: a fraction above 0.75 needs the next power.
        bits = amax.view(torch.int32)
        exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)).clamp(min=1)
        scales = (exponent << 23).to(torch.int32).view(torch.float32)
    else:
        scales = (amax / E4M3_MAX).clamp(min=MIN_SCALE)
    scales = torch.where(amax == 0, 1.0, scales)
    return torch.where(amax.isfinite(), scales, torch.nan)


def _scale_shape(shape: torch.Size | tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def empty_quantized(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty(_scale_shape(x.shape, block), dtype=torch.float32, device=x.device)


def check_types(
    kind: str, name: str, codes: torch.Tensor, scales: torch.Tensor, code_type: torch.dtype
) -> None:
    """Raise TypeError when the parts of a quantised tensor are not of `code_type` and FP32."""
    if codes.dtype != code_type or scales.dtype != torch.float32:
        raise TypeError(
            f"{kind}: {name} are {codes.dtype} and scales {scales.dtype}; "
            f"they must be {code_type} and torch.float32"
        )


def check_scales(
    kind: str, name: str, codes: torch.Tensor, scales: torch.Tensor, expected: tuple[int, ...], described: str
) -> None:
    """Raise ValueError when scales do not fit their codes in shape (`described` says what needs `expected`)
    or device, or when one of the two is not contiguous."""
    if tuple(scales.shape) != expected:
        raise ValueError(f"{kind}: scales have shape {tuple(scales.shape)}; {described} {expected}")
    if codes.device != scales.device:
        raise ValueError(f"{kind}: {name} are on {codes.device}, scales on {scales.device}")
    if not (codes.is_contiguous() and scales.is_contiguous()):
        raise ValueError(f"{kind}: {name} and scales must be contiguous; call .contiguous() on both")


def check_values(
    function: str, name: str, values: torch.Tensor, beside: torch.Tensor, beside_name: str
) -> None:
    """Raise TypeError or ValueError when `values` is no FP32 or BF16, or not on the device of `beside`."""
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{function}: {name} is {values.dtype}; pass torch.float32 or torch.bfloat16")
    if values.device != beside.device:
        raise ValueError(
            f"{function}: {name} is on {values.device} and {beside_name} on {beside.device}; move one of them"
        )


def check_input(function: str, x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{function}: the tensor has shape {tuple(x.shape)}; pass a matrix [rows, cols]")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{function}: the tensor is {x.dtype}; pass torch.float32 or torch.bfloat16")


@jit
def tiles_kernel(
    x, codes, scales, rows, cols, stride_row, stride_col,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one column of tiles."""
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tile.to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    values = tl.load(x + row[:, None] * stride_row + col[None, :] * stride_col, mask=inside, other=0.0)
    values = values.to(tl.float32)
    scale = kernel_scale(tl.max(magnitude_bits(values), axis=1), POWER_OF_TWO)
    tl.store(codes + row[:, None] * cols + col[None, :], kernel_encode(values, scale[:, None]), mask=inside)
    tl.store(scales + row * tl.cdiv(cols, 128) + tile, scale, mask=row < rows)


@jit
def blocks_kernel(
    w, codes, scales, rows, cols, stride_matrix, stride_row, stride_col,
    POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """One program: one 128x128 block of one matrix."""
    bands = tl.cdiv(rows, 128)
    matrix = (tl.program_id(0) // bands).to(tl.int64)
    row = (tl.program_id(0) % bands).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    w += matrix * stride_matrix
    values = tl.load(w + row[:, None] * stride_row + col[None, :] * stride_col, mask=inside, other=0.0)
    values = values.to(tl.float32)
    scale = kernel_scale(tl.max(tl.max(magnitude_bits(values), axis=1), axis=0), POWER_OF_TWO)
    codes += matrix * rows * cols
    tl.store(codes + row[:, None] * cols + col[None, :], kernel_encode(values, scale), mask=inside)
    tl.store(scales + tl.program_id(0) * tl.cdiv(cols, 128) + tl.program_id(1), scale)


@jit
def magnitude_bits(values):
    """Bits of |values|. As integers they order like the numbers, with NaN above infinity: a maximum over them
    cannot lose a NaN, as the floating-point maximum of the hardware does."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def kernel_scale(amax_bits, POWER_OF_TWO: tl.constexpr):
    # div_rn is the IEEE division; the operator / compiles to an approximation with other last bits.
    if POWER_OF_TWO:
        exponent = (amax_bits >> 23) - 8 + ((amax_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), 448.0)
        scale = tl.maximum(scale, 1.1754943508222875e-38)  # MIN_SCALE
    scale = tl.where(amax_bits == 0, 1.0, scale)
    return tl.where(amax_bits < 0x7F800000, scale, float("nan"))


@jit
def kernel_encode(values, scale):
    """Codes of `values`; `scale` has one element for each tile, so that its inverse is taken once a tile."""
    return (values * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
