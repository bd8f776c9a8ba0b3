"""The logistic function, sums of rows and square roots as fixed sequences of correctly rounded operations.

The exponentials of PyTorch and of the GPU are not correctly rounded and differ in their last bits, and
neither PyTorch nor Triton says in which order it sums. Both would show in FP8 codes. So each is spelled out
here twice, for PyTorch and for Triton, with the same IEEE 754 operations in the same order: the two agree bit
for bit.

- sigmoid(x) = 1 / (1 + exp(-x)): -x log2(e) = n + f with n the nearest integer; 2**f by a polynomial, minimax
  on |f| <= 1/2; times 2**n; one is added; the inverse by Newton's method, from a first guess that subtracts
  the exponent and fraction as integers. That is 22 instructions without a branch; an exponential and a
  division took 47. The relative error is below 2 * 2**-23 for positive x and (2 - x) * 2**-23 for negative.
  For x below -86.6, sigmoid(x) is zero.
- A sum: column j goes to lane j modulo 1024, each lane adds its columns from left to right, and neighbouring
  lanes are added in pairs until one is left.
- A square root needs no sequence: the GPU's (`tl.sqrt_rn`) and NumPy's are correctly rounded. PyTorch's on a
  CPU may be MKL's, which on some processors is off by one unit in the last place.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.backend import jit, tl

STEP_TILES = 8  # tiles of 128 columns that a program handles at a time
STEP = STEP_TILES * 128

LOG2_E = 1.44269504088896341
SHIFT = 1.5 * 2.0**23  # x + SHIFT rounds x to an integer, found in the low bits of the sum
LIMIT = 125.0  # powers of two up to this one, and their inverses, are normal numbers
ONE_BITS = 0x3F800000
# Of 2**f, from the fifth degree down, each an FP32 number.
POLYNOMIAL = (
    0.001326472731307149,
    0.009671513922512531,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)
GUESS_BITS = 0x7EF311C7  # less the bits of x: 1 / x to within 5%
NEWTON_STEPS = 3  # 5% -> 0.3% -> 7e-6 -> FP32


def sigmoids(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sigmoid(x) and sigmoid(-x) of FP32 values of any shape. NaN gives NaN."""
    scaled = (x * -LOG2_E).clamp_(min=-LIMIT)
    shifted = scaled + SHIFT
    fraction = (scaled - (shifted - SHIFT)).double()
    value = torch.full_like(scaled, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        value = _fma(value, fraction, coefficient)
    # The low bits of SHIFT are zero: what the shift leaves of the sum is n in the place of the exponent.
    power = (shifted.view(torch.int32) << 23).add_(ONE_BITS).view(torch.float32)
    exponential = value.mul_(power)
    divisor = exponential + 1.0
    inverse = (GUESS_BITS - divisor.view(torch.int32)).view(torch.float32)
    negative = divisor.double().neg_()
    for _ in range(NEWTON_STEPS - 1):
        inverse.mul_(_fma(inverse, negative, 2.0))
    inverse = _fma(inverse, _fma(inverse, negative, 1.0).double(), inverse)
    beyond = scaled > LIMIT
    return inverse.masked_fill(beyond, 0.0), exponential.mul_(inverse).masked_fill_(beyond, 1.0)


def square_root_(x: torch.Tensor) -> torch.Tensor:
    """Replace FP32 values, any shape, by their square roots, correctly rounded. Of a negative one: NaN."""
    if x.device.type != "cpu":
        return x.sqrt_()
    values = x.detach().numpy()
    with np.errstate(invalid="ignore"):
        np.sqrt(values, out=values)
    return x


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums over the columns of an FP32 matrix [rows, cols]: [rows], in the order given above."""
    # Lanes that no column goes to are zero; adding them in pairs changes nothing but the sign of a zero.
    lanes = x.new_zeros((x.shape[0], min(STEP, 1 << max(x.shape[1] - 1, 0).bit_length())))
    for start in range(0, x.shape[1], STEP):
        step = x[:, start : start + STEP]
        lanes[:, : step.shape[1]] += step
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0] + 0.0


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | float) -> torch.Tensor:
    """a * b + c, rounded once to FP32: `a` in FP32, `b` in FP64, both holding FP32 numbers.

    FP64 holds the product exactly. Its rounding of the sum, before that to FP32, could change the result; for
    no fraction of the polynomial and no divisor of Newton's method it does: all were tried.
    """
    return (b * a).add_(c).float()


@jit
def kernel_sigmoids(x):
    """`sigmoids` in Triton: the same operations in the same order."""
    scaled = tl.maximum(x * -1.44269504088896341, -125.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = scaled + 12582912.0
    fraction = scaled - (shifted - 12582912.0)
    value = tl.fma(fraction, 0.001326472731307149, 0.009671513922512531)
    value = tl.fma(value, fraction, 0.05550733581185341)
    value = tl.fma(value, fraction, 0.24022242426872253)
    value = tl.fma(value, fraction, 0.6931470036506653)
    value = tl.fma(value, fraction, 1.0)
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    divisor = tl.fma(value, power, 1.0)  # as the sum of 1 and the product, since the product is exact
    inverse = (0x7EF311C7 - divisor.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    for _ in tl.static_range(2):
        inverse = inverse * tl.fma(inverse, -divisor, 2.0)
    inverse = tl.fma(inverse, tl.fma(inverse, -divisor, 1.0), inverse)  # costs the same and rounds better
    beyond = scaled > 125.0
    return tl.where(beyond, 0.0, inverse), tl.where(beyond, 1.0, value * power * inverse)


@jit
def kernel_lane_sum(lanes):
    """The sum of 1024 lanes [8, 128]."""
    return tl.sum(kernel_lane_sums(tl.reshape(lanes, (1, 1024))), axis=0)


@jit
def kernel_lane_sums(lanes):
    """The sums of lanes [rows, 1024], one a row. Reducing two is one addition, so the order is fixed."""
    for level in tl.static_range(1, 11):
        lanes = tl.sum(tl.reshape(lanes, (lanes.shape[0], 1024 >> level, 2)), axis=2)
    return tl.reshape(lanes, (lanes.shape[0],))
