"""Hopper's FP8 tensor core, emulated: how a sum of E4M3 products loses precision (DeepSeek-V3 report, section
3.3.2; ISCA 2025 paper, section 3.1.1).

Published: 32 products are aligned to the largest exponent among them, 13 fraction bits are kept and the rest
is truncated; sums go into a register of 1 sign, 8 exponent and 13 fraction bits.

Chosen here, because it is not published:

- The exponent of a product is the sum of its factors' exponents, so its significand lies in [1, 4). A
  subnormal factor has exponent -6. Products of zero have no exponent.
- Truncation is toward zero, of products as of the register.
- The aligned products are summed exactly, then added to the register, then truncated once. With `joins` the
  register is a 33rd number in the alignment instead, as was measured for older tensor cores in FP16.

Everything is integer arithmetic in units of 2**-18, the smallest E4M3 number squared. No GPU has been asked
yet whether it computes like this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.formats.quantize import BLOCKS, TILE, TILES, Quantized

UNIT = 18
LARGEST_SUM = 2**17  # so many products of 448 * 448 still have an exact FP64 exponent


@dataclass(frozen=True)
class TensorCore:
    """What is kept of a sum."""

    products: int = 32
    """How many are aligned together."""
    fraction: int = 13
    """Bits kept below the largest exponent, and in the register."""
    joins: bool = False
    """Whether the register is aligned with the products."""


HOPPER = TensorCore()


def tensor_core_sum(a: torch.Tensor, b: torch.Tensor, core: TensorCore = HOPPER) -> torch.Tensor:
    """What the register holds after a @ b.T: FP32 [M, N] from E4M3 codes a [M, K] and b [N, K].

    Nothing is promoted. A NaN makes its row or column of the result NaN.

    Raises:
        TypeError: a or b is no torch.float8_e4m3fn.
        ValueError: a and b are no matrices of one K, or K is above 131,072.
    """
    _check("tensor_core_sum", a, b)
    (a_values, a_exponents), (b_values, b_exponents) = _parts(a), _parts(b)
    register = torch.zeros((len(a), len(b)), dtype=torch.int64, device=a.device)
    for start in range(0, a.shape[1], core.products):
        part = slice(start, start + core.products)
        products = a_values[:, None, part] * b_values[None, :, part]
        exponents = a_exponents[:, None, part] + b_exponents[None, :, part]
        exponents = torch.where(products == 0, _NO_EXPONENT, exponents)
        largest = exponents.amax(-1)
        if core.joins:
            largest = torch.maximum(largest, _exponent(register))
        dropped = (largest + UNIT - core.fraction).clamp(min=0)
        total = _truncate(products, dropped[..., None]).sum(-1)
        total += _truncate(register, dropped) if core.joins else register
        register = _truncate(total, (_exponent(total) + UNIT - core.fraction).clamp(min=0))
    # At most 14 significant bits: exact in FP32.
    out = (register.double() * 2.0**-UNIT).float()
    spoiled = a.float().isnan().any(1)[:, None] | b.float().isnan().any(1)[None, :]
    return out.masked_fill_(spoiled, torch.nan)


def promoted_sum(
    a: torch.Tensor, b: torch.Tensor, interval: int = TILE, core: TensorCore = HOPPER
) -> torch.Tensor:
    """a @ b.T with the register added to an FP32 sum, and cleared, after every `interval` products.

    Shapes, types and errors are those of `tensor_core_sum`.

    Raises:
        ValueError: `interval` is no positive multiple of the products that are aligned together.
    """
    _check("promoted_sum", a, b)
    if interval <= 0 or interval % core.products:
        raise ValueError(
            f"promoted_sum: interval is {interval}; it must be a positive multiple of {core.products}"
        )
    total = torch.zeros((len(a), len(b)), dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[1], interval):
        part = slice(start, start + interval)
        total += tensor_core_sum(a[:, part], b[:, part], core)
    return total


def tensor_core_gemm(a: Quantized, b: Quantized, core: TensorCore = HOPPER) -> torch.Tensor:
    """What `kernels.gemms.gemm` gives when each group of 128 products runs on this tensor core: FP32 [M, N].

    The register of each group is scaled and added in FP32, in the order of the groups. On a GPU scaling and
    adding are one rounding; here they are three.

    Raises:
        ValueError: a is not in 1x128 tiles, or a and b do not fit.
    """
    if a.block != TILES:
        raise ValueError(f"tensor_core_gemm: a is in blocks of {a.block}; quantise it with quantize_tiles")
    _check("tensor_core_gemm", a.codes, b.codes)
    b_scales = b.scales
    if b.block == BLOCKS:
        b_scales = b_scales.repeat_interleave(TILE, dim=0)[: b.shape[0]]
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.codes.device)
    for group in range(a.scales.shape[1]):
        part = slice(group * TILE, (group + 1) * TILE)
        dot = tensor_core_sum(a.codes[:, part], b.codes[:, part], core)
        total += dot * a.scales[:, group, None] * b_scales[None, :, group]
    return total


_NO_EXPONENT = -1000


def _parts(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in units of 2**-9 and exponents of E4M3 codes, int64."""
    bits = codes.contiguous().view(torch.uint8).long()
    field, fraction = (bits >> 3) & 15, bits & 7
    exponents = field.clamp(min=1) - 7
    magnitudes = torch.where(field > 0, fraction + 8, fraction) << (field.clamp(min=1) - 1)
    return torch.where(bits >= 128, -magnitudes, magnitudes), exponents


def _exponent(values: torch.Tensor) -> torch.Tensor:
    """Exponents of integers in units of 2**-18; that of zero is below all others."""
    exponents = torch.frexp(values.double()).exponent.long() - 1 - UNIT
    return torch.where(values == 0, _NO_EXPONENT, exponents)


def _truncate(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Clear the lowest `bits` of the magnitudes."""
    return values.sign() * (values.abs() >> bits << bits)


def _check(function: str, a: torch.Tensor, b: torch.Tensor) -> None:
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{function}: {name} is {codes.dtype}; pass codes in torch.float8_e4m3fn")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{function}: a is {tuple(a.shape)} and b {tuple(b.shape)}; they must be [M, K] and [N, K]"
        )
    if a.shape[1] > LARGEST_SUM:
        raise ValueError(f"{function}: K is {a.shape[1]}; sums of at most {LARGEST_SUM} are exact here")
    if a.device != b.device:
        raise ValueError(f"{function}: a is on {a.device} and b on {b.device}; move one of them")
