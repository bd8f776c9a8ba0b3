"""The exponential and the sum of a row as fixed sequences of correctly rounded FP32 operations; square roots.

The exponentials of PyTorch and of the GPU are not correctly rounded and differ in their last bits, and
neither PyTorch nor Triton says in which order it sums. Both would show in FP8 codes. So each is spelled out
here twice, for PyTorch and for Triton, with the same IEEE 754 multiplications and additions in the same
order: the two agree bit for bit.

- exp(a), a <= 0: a = n ln 2 + r with n = round(a / ln 2); the polynomial of Cephes' expf on |r| <= ln(2) / 2;
  then 2**n in two halves, so that a subnormal result rounds once. The relative error is below 2**-23, that of
  subnormal results below 2**-149.
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

EXP_FLOOR = -110.0  # exp is 0 in FP32 from here on down
LOG2_E = 1.44269504088896341
SHIFT = 1.5 * 2.0**23  # x + SHIFT rounds x to an integer, found in the low bits of the sum
SHIFT_BITS = 0x4B400000
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the first has 9 bits: its product with n is exact
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def exp_negative(a: torch.Tensor) -> torch.Tensor:
    """exp(a) of FP32 values a <= 0, any shape. NaN gives NaN; minus infinity gives 0."""
    a = torch.where(a < EXP_FLOOR, EXP_FLOOR, a)
    shifted = (a * LOG2_E).add_(SHIFT)
    n = shifted - SHIFT
    r = a.sub_(n * LN2_HIGH).sub_(n.mul_(LN2_LOW))
    value = r * EXP_POLYNOMIAL[0]
    for coefficient in EXP_POLYNOMIAL[1:-1]:
        value.add_(coefficient).mul_(r)
    value.add_(EXP_POLYNOMIAL[-1]).mul_(r * r).add_(r).add_(1.0)
    exponent = shifted.view(torch.int32).sub_(SHIFT_BITS)
    half = exponent >> 1
    return value.mul_(_power_of_two(half)).mul_(_power_of_two(exponent.sub_(half)))


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
    lanes = x.new_zeros((x.shape[0], STEP))
    for start in range(0, x.shape[1], STEP):
        step = x[:, start : start + STEP]
        lanes[:, : step.shape[1]] += step
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0]


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


@jit
def kernel_exp_negative(a):
    """`exp_negative` in Triton: the same operations in the same order."""
    a = tl.where(a < -110.0, -110.0, a)
    shifted = a * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (a - n * 0.693359375) - n * -2.12194440e-4
    value = (r * 1.9875691500e-4 + 1.3981999507e-3) * r
    value = (value + 8.3334519073e-3) * r
    value = (value + 4.1665795894e-2) * r
    value = (value + 1.6666665459e-1) * r
    value = ((value + 5.0000001201e-1) * (r * r) + r) + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    value = value * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return value * ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)


@jit
def kernel_lane_sum(lanes):
    """The sum of 1024 lanes [8, 128]. Reducing two elements is one addition, so the order is fixed."""
    lanes = tl.reshape(lanes, (1024,))
    for level in tl.static_range(1, 11):
        lanes = tl.sum(tl.reshape(lanes, (1024 >> level, 2)), axis=1)
    return tl.sum(lanes, axis=0)
