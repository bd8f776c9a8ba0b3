"""Independent computations in float64, from the definitions of the formats, to check the kernels with.

Nothing here calls the references. Scales that are powers of two make every step exact, and then so is what is
asked of codes and scales. What follows roundings (of other scales, of an exponential, of a sum) is known to a
relative `slack`: a code is then right if it is the nearest to some value within the slack.
"""

from __future__ import annotations

import torch

from kernels.formats.quantize import Quantized


def two_to(exponent: torch.Tensor) -> torch.Tensor:
    """float64 powers of two from -1022 to 1023, by their bits: a GPU's pow need not be exact."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def nearest(x: torch.Tensor, fraction_bits: int, min_exponent: int, biggest: float) -> torch.Tensor:
    """float64 `x` rounded to nearest even in a floating-point format, saturating at +-`biggest`."""
    exponent = torch.frexp(x).exponent - 1
    step = two_to(exponent.clamp(min=min_exponent) - fraction_bits)
    return ((x / step).round() * step).clamp(-biggest, biggest)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return nearest(x, 3, -6, 448.0)


def power_above(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two from `x` on."""
    mantissa, exponent = torch.frexp(x)
    return two_to(exponent - (mantissa == 0.5).int())


def spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """The float64 scale of each element of a matrix in blocks."""
    wide = scales.double().repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return wide[: shape[0], : shape[1]]


def block_amax(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude in each block of a matrix."""
    rows, cols = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -cols % block[1], 0, -rows % block[0]))
    tiles = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    return tiles.amax(dim=(1, 3)) if x.numel() else tiles.new_zeros(tiles.shape[0], tiles.shape[2])


def scale_of(amax: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """The FP8 scale of a block whose largest magnitude is `amax` (float64)."""
    scale = (amax / 448).float().double()
    if power_of_two:
        scale = power_above(scale)
    return torch.where(amax == 0, 1.0, scale.clamp(min=2.0**-126))


def values_of(q: Quantized) -> torch.Tensor:
    """The float64 matrix that `q` stands for, exactly."""
    return q.codes.float().double() * spread(q.scales, q.block, q.shape)


def wrong(q: Quantized, exact: torch.Tensor, power_of_two: bool = False, slack: float = 0.0) -> int:
    """How many codes and scales of `q` are not those of `exact` (float64, finite), known to `slack`."""
    if q.shape != exact.shape:
        return max(q.codes.numel(), exact.numel())
    amax, scales = block_amax(exact, q.block), q.scales.double()
    low, high = (scale_of(amax * (1 + sign * slack), power_of_two) for sign in (-1, 1))
    bad_scales = ~((low <= scales) & (scales <= high))
    codes = q.codes.float().double()
    quotient = exact / spread(scales, q.block, q.shape)
    ends = [e4m3(quotient * (1 + sign * slack)) for sign in (-1, 1)]
    inside = (torch.minimum(*ends) <= codes) & (codes <= torch.maximum(*ends))
    bad_codes = ~inside | (torch.signbit(codes) != torch.signbit(exact))
    return int(bad_scales.sum()) + int(bad_codes.sum())


def off(value: torch.Tensor, exact: torch.Tensor, slack: float) -> int:
    """How many elements of `value` are off `exact` (float64) by more than a relative `slack`, or are NaN."""
    if value.shape != exact.shape:
        return max(value.numel(), exact.numel())
    return int((~((value.double() - exact).abs() <= slack * exact.abs())).sum())
