"""The emulated tensor core: sums worked by hand, a second implementation in fractions, and its limits."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from kernels.formats.quantize import quantize_blocks, quantize_tiles
from kernels.gemms.gemm import gemm_reference
from kernels.gemms.tensor_core import HOPPER, TensorCore, promoted_sum, tensor_core_gemm, tensor_core_sum
from kernels.metrics import relative_error

JOINED = replace(HOPPER, joins=True)
Product = tuple[float, float]


def codes(rows: list[list[float]]) -> torch.Tensor:
    values = torch.tensor(rows)
    found = values.to(torch.float8_e4m3fn)
    assert torch.equal(found.float(), values), "the test means numbers that E4M3 holds"
    return found


def dot(*groups: list[Product], core: TensorCore = HOPPER) -> float:
    """The register after groups of up to 32 products each."""
    pairs = [pair for group in groups for pair in group + [(0.0, 0.0)] * (32 - len(group))]
    left, right = zip(*pairs, strict=True)
    return float(tensor_core_sum(codes([list(left)]), codes([list(right)]), core))


def power(exponent: int) -> Product:
    """Two factors of 2**exponent."""
    first = max(-9, min(8, exponent // 2))
    return 2.0**first, 2.0 ** (exponent - first)


def test_thirteen_bits_below_the_largest_exponent_are_kept() -> None:
    assert dot([power(0), power(-13)]) == 1 + 2.0**-13
    assert dot([power(0), power(-14)]) == 1
    assert dot([power(-14), power(-14)]) == 2.0**-13
    # 31 small products together are worth 15.5 units, and each is cut by itself.
    assert dot([power(0), *[power(-14)] * 31]) == 1


def test_a_product_keeps_its_upper_bits() -> None:
    # 1.125 * 2**-11 is 2**-11 + 2**-14; the last bit lies below the unit.
    assert dot([power(0), (1.125 * 2.0**-5, 2.0**-6)]) == 1 + 2.0**-11


def test_truncation_is_toward_zero_for_both_signs() -> None:
    small, large = power(-14), power(0)
    assert dot([large, (-small[0], small[1])]) == 1
    assert dot([(-large[0], large[1]), small]) == -1


def test_the_exponent_of_a_product_is_the_sum_of_its_factors_exponents() -> None:
    # 1.5 * 1.5 = 2.25 is aligned at 2**0, so that both 2**-13 stay; at 2**1 both would go.
    assert dot([(1.5, 1.5), power(-13), power(-13)]) == 2.25 + 2.0**-12


def test_a_subnormal_factor_has_the_smallest_exponent() -> None:
    # 2**-9 * 2**8 is 2**-1, aligned at 2**(-6 + 8), so that bits below 2**-11 go.
    assert dot([(2.0**-9, 2.0**8), power(-11)]) == 0.5 + 2.0**-11
    assert dot([(2.0**-9, 2.0**8), power(-12)]) == 0.5


def test_a_zero_product_has_no_exponent() -> None:
    assert dot([(448.0, 0.0), power(-18)]) == 2.0**-18


def test_products_that_cancel_do_not_bring_small_ones_back() -> None:
    assert dot([power(0), (-1.0, 1.0), power(-14)]) == 0


def test_the_register_keeps_fourteen_significant_bits() -> None:
    assert dot([power(13)], [power(0)]) == 2**13 + 1
    assert dot([power(14)], [power(0)]) == 2**14
    assert dot([power(14)], *[[power(0)]] * 100) == 2**14
    assert dot([(-128.0, 128.0)], [power(0)]) == -(2**14) + 1  # below 2**14 the unit is 1


def test_a_register_that_is_aligned_with_the_products_cuts_each_of_them() -> None:
    small = [power(-14)] * 31
    # Apart: 15.5 units are added at once and half a unit is cut. Joined: each half unit is cut.
    assert dot([power(0)], small) == 1 + 15 * 2.0**-13
    assert dot([power(0)], small, core=JOINED) == 1
    # A large product cuts the register too.
    assert dot([power(-6)], [power(8)], core=JOINED) == 2**8
    assert dot([power(-5)], [power(8)], core=JOINED) == 2**8 + 2.0**-5


def test_promotion_keeps_what_the_register_loses() -> None:
    # 2**14 in the first 32 products, 1 in the next.
    row = codes([[128.0] + [0.0] * 31 + [1.0] + [0.0] * 31])
    assert float(promoted_sum(row, row, 64)) == 2**14
    assert float(promoted_sum(row, row, 32)) == 2**14 + 1


def test_every_finite_code_times_one_is_its_value() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    every = every[every & 127 != 127].view(torch.float8_e4m3fn)
    found = tensor_core_sum(every[:, None], codes([[1.0]]))
    assert torch.equal(found[:, 0], every.float())


def exponent_of(value: Fraction) -> int:
    return math.frexp(float(value))[1] - 1


def cut(value: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(value / unit) * unit


def in_fractions(a: list[float], b: list[float], joins: bool) -> Fraction:
    """The same register, a number at a time."""
    register = Fraction(0)
    for start in range(0, len(a), 32):
        pairs = [
            (Fraction(x), Fraction(y))
            for x, y in zip(a[start : start + 32], b[start : start + 32], strict=True)
        ]
        exponents = [
            sum(max(exponent_of(factor), -6) for factor in pair) for pair in pairs if pair[0] * pair[1] != 0
        ]
        if joins and register:
            exponents.append(exponent_of(register))
        if not exponents:
            continue
        unit = Fraction(2) ** (max(exponents) - 13)
        total = cut(register, unit) if joins else register
        total += sum(cut(x * y, unit) for x, y in pairs)
        register = cut(total, Fraction(2) ** (exponent_of(total) - 13)) if total else total
    return register


@pytest.mark.parametrize("core", [HOPPER, JOINED], ids=["apart", "joined"])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_agrees_with_fractions(core: TensorCore, spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    # Magnitudes from subnormal numbers to the largest; 200 is no multiple of 32.
    a, b = (
        (
            torch.randn(rows, 200, generator=generator)
            * spread
            * 4.0 ** torch.randn(rows, 200, generator=generator)
        )
        .clamp(-448, 448)
        .to(torch.float8_e4m3fn)
        for rows in (5, 4)
    )
    found = tensor_core_sum(a, b, core)
    for i, left in enumerate(a.float().tolist()):
        for j, right in enumerate(b.float().tolist()):
            assert Fraction(float(found[i, j])) == in_fractions(left, right, core.joins)


@pytest.mark.parametrize("second", [quantize_tiles, quantize_blocks])
def test_the_scaled_product_is_near_the_reference_and_not_equal(second) -> None:
    generator = torch.Generator().manual_seed(0)
    a = quantize_tiles(torch.randn(9, 300, generator=generator))
    b = second(torch.randn(140, 300, generator=generator))
    error = relative_error(tensor_core_gemm(a, b), gemm_reference(a, b))
    assert 1e-6 < error < 1e-3


def test_the_scaled_product_is_exact_where_nothing_is_cut() -> None:
    whole = torch.randint(-4, 5, (6, 256), generator=torch.Generator().manual_seed(0)).float()
    whole[:, ::128] = 4.0
    a, b = quantize_tiles(whole, power_of_two=True), quantize_tiles(whole.flip(0), power_of_two=True)
    assert torch.equal(tensor_core_gemm(a, b), whole @ whole.flip(0).t())


def test_nan_spoils_its_row_and_column() -> None:
    a, b = torch.ones(3, 40), torch.ones(2, 40)
    a[1, 39], b[0, 0] = math.nan, math.nan
    found = tensor_core_sum(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn))
    assert found.isnan().tolist() == [[True, False], [True, True], [True, False]]
    assert float(found[0, 1]) == 40


def test_no_products_are_zero() -> None:
    empty = torch.zeros(2, 0).to(torch.float8_e4m3fn)
    assert torch.equal(tensor_core_sum(empty, empty), torch.zeros(2, 2))


def test_errors_say_what_fits() -> None:
    good = torch.ones(2, 64).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"tensor_core_sum: b is torch.float32; pass codes"):
        tensor_core_sum(good, good.float())
    with pytest.raises(ValueError, match=r"a is \(2, 64\) and b \(2, 32\)"):
        tensor_core_sum(good, good[:, :32])
    with pytest.raises(ValueError, match="interval is 48; it must be a positive multiple of 32"):
        promoted_sum(good, good, 48)
    wide = torch.zeros(1, 2**17 + 32).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="K is 131104"):
        tensor_core_sum(wide, wide)
    blocks = quantize_blocks(torch.ones(2, 64))
    with pytest.raises(ValueError, match="quantise it with quantize_tiles"):
        tensor_core_gemm(blocks, blocks)
