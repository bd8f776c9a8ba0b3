"""Fused SwiGLU against float64, against its unfused parts, and its Triton logic by the interpreter."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from kernels.formats.exact import POLYNOMIAL, _fma, row_sums, sigmoids
from kernels.formats.quantize import TILES, Quantized, dequantize, quantize_blocks, quantize_tiles
from kernels.fused.swiglu import swiglu_backward, swiglu_quantize
from kernels.metrics import MAX_ERROR_BF16, relative_error
from tests.kernels.interpreter import needs_interpreter, run_interpreted

WIDTHS = [1, 127, 128, 200, 1100]


def make(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """both [rows, 2 * width], weights [rows] and dy [rows, width]."""
    generator = torch.Generator().manual_seed(width)
    both = (torch.randn(rows, 2 * width, generator=generator) * 3).to(dtype)
    weights = torch.rand(rows, generator=generator)
    return both, weights, torch.randn(rows, width, generator=generator).to(dtype)


def exact(both: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    gate, up = both.double().chunk(2, dim=1)
    product = silu(gate) * up
    return product if weights is None else product * weights.double()[:, None]


def test_the_logistic_function_is_within_its_bound() -> None:
    x = torch.cat([torch.linspace(-86.6, 86.6, 500_001), torch.logspace(-40, 0, 1001)])
    x = torch.cat([x, -x])
    for found, sign in zip(sigmoids(x), (1, -1), strict=True):
        expected = torch.sigmoid(sign * x.double())
        bound = (2 + (-sign * x.double()).relu()) * 2.0**-23
        assert ((found - expected).abs() <= bound * expected).all()
    edges = torch.tensor([0.0, -0.0, -87.0, -1e30, -torch.inf, 150.0, 1e30, torch.inf])
    assert sigmoids(edges)[0].tolist() == [0.5, 0.5, 0, 0, 0, 1, 1, 1]
    assert all(found.isnan().all() for found in sigmoids(torch.tensor([torch.nan, -torch.nan])))


def nearest(value: Fraction) -> float:
    """The FP32 number nearest to `value`."""
    near = np.float32(float(value))
    sides = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    return float(min((near, *sides), key=lambda number: abs(Fraction(float(number)) - value)))


def test_fused_operations_are_rounded_once() -> None:
    """The polynomial in exact arithmetic, also where its products are about half a unit of its sums."""
    for exponent in (-24, -25, -28, -34, -45, -46, -47, -48, -49, -60):
        for mantissa in range(2**23, 2**24, 160_001):
            for fraction in (mantissa * 2.0**exponent, -mantissa * 2.0**exponent):
                value = torch.tensor([POLYNOMIAL[0]])
                for coefficient in POLYNOMIAL[1:]:
                    exact_sum = Fraction(value.item()) * Fraction(fraction) + Fraction(coefficient)
                    value = _fma(value, torch.tensor([fraction]).double(), coefficient)
                    assert value.item() == nearest(exact_sum)


@pytest.mark.parametrize("cols", [0, 1, 127, 1024, 3000])
def test_row_sums_are_sums(cols) -> None:
    x = torch.randn(5, cols, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(row_sums(x).double(), x.double().sum(dim=1), rtol=0, atol=1e-5)
    whole = torch.randint(-99, 99, (5, cols), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(row_sums(whole), whole.sum(dim=1))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_output_is_the_unfused_one(width, dtype, weighted, power_of_two) -> None:
    both, weights, _ = make(7, width, dtype)
    weights = weights if weighted else None
    found = swiglu_quantize(both, weights, power_of_two=power_of_two)
    expected = quantize_tiles(exact(both, weights).float(), power_of_two=power_of_two)
    assert found.block == TILES
    assert found.shape == (7, width)
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-6, atol=0)
    # A value within rounding of a midpoint may fall on the other side of it: at most one code away.
    apart = found.codes.view(torch.uint8).int() - expected.codes.view(torch.uint8).int()
    assert apart.abs().max() <= 1
    assert apart.ne(0).float().mean() < 1e-3 + 1 / apart.numel()
    assert relative_error(dequantize(found), exact(both, weights)) < 0.04


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_against_float64(width, weighted) -> None:
    both, weights, dy = make(7, width)
    leaves = [both.double().requires_grad_(), weights.double().requires_grad_()]
    used = leaves if weighted else leaves[:1]
    expected = torch.autograd.grad(exact(leaves[0], leaves[1] if weighted else None), used, dy.double())
    d_both, d_weights = swiglu_backward(dy, both, weights if weighted else None)
    assert relative_error(d_both, expected[0]) < 3e-7
    if weighted:
        assert relative_error(d_weights, expected[1]) < 3e-6
    else:
        assert d_weights is None


@pytest.mark.parametrize("width", WIDTHS)
def test_an_fp8_cache_stands_for_the_values_it_holds(width) -> None:
    both, weights, dy = make(6, width)
    cache = quantize_tiles(both)
    values = dequantize(cache)
    found, expected = swiglu_quantize(cache, weights), swiglu_quantize(values, weights)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)
    for one, other in zip(
        swiglu_backward(dy, cache, weights), swiglu_backward(dy, values, weights), strict=True
    ):
        assert torch.equal(one, other)
    # And the cost of the cache itself.
    assert relative_error(swiglu_backward(dy, cache)[0], swiglu_backward(dy, both)[0].double()) < 0.1


def test_types_of_the_gradients() -> None:
    both, weights, dy = make(4, 130, torch.bfloat16)
    d_both, d_weights = swiglu_backward(dy, both, weights)
    assert (d_both.dtype, d_weights.dtype) == (torch.bfloat16, torch.float32)
    wide = swiglu_backward(dy.float(), both, weights.bfloat16())
    assert (wide[0].dtype, wide[1].dtype) == (torch.float32, torch.bfloat16)
    assert relative_error(d_both, swiglu_backward(dy.float(), both, weights)[0]) < MAX_ERROR_BF16


def test_large_gates_do_not_overflow() -> None:
    gate = torch.tensor([[-1e30, -100.0, -86.0, -60.0, -0.0, 0.0, 60.0, 1e30]])
    ones = torch.ones_like(gate)
    d_both, _ = swiglu_backward(ones, torch.cat([gate, ones], dim=1))
    leaf = gate.double().requires_grad_()
    (expected,) = torch.autograd.grad(silu(leaf).sum(), leaf)
    torch.testing.assert_close(d_both[:, :8].double(), expected, rtol=3e-6, atol=1e-35)
    torch.testing.assert_close(d_both[:, 8:].double(), silu(gate.double()), rtol=3e-6, atol=1e-35)


def test_an_outlier_costs_precision_in_its_own_tile_only() -> None:
    both, _, _ = make(3, 384)
    both[0, 5] = both[0, 384 + 5] = 1e4
    found, expected = dequantize(swiglu_quantize(both)), exact(both, None)
    assert relative_error(found[0, 6:128], expected[0, 6:128]) > 0.3
    assert relative_error(found[0, 128:], expected[0, 128:]) < 0.04
    assert relative_error(found[1:], expected[1:]) < 0.04


def test_zeros_have_scale_one_and_zero_gradients_of_the_gate() -> None:
    found = swiglu_quantize(torch.zeros(3, 400), torch.ones(3))
    assert found.scales.eq(1).all()
    assert dequantize(found).eq(0).all()
    d_both, d_weights = swiglu_backward(torch.ones(3, 200), torch.zeros(3, 400), torch.ones(3))
    assert d_both.eq(0).all()
    assert d_weights.eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["gate", "up", "weight", "cache"])
def test_nan_and_infinity_surface(place, bad) -> None:
    both, weights, dy = make(4, 300)
    if place == "weight":
        weights[2] = bad
    else:
        both[2, 140 if place == "gate" else 440] = bad
    source = quantize_tiles(both) if place == "cache" else both
    spoiled = dequantize(swiglu_quantize(source, weights)).isnan()
    # The third tile of the cache, columns 384 to 511, holds ups of two tiles of the output.
    assert spoiled[2, :128].all() == (place in ("weight", "cache"))
    assert spoiled[2, 128:256].all()
    assert not spoiled[[0, 1, 3]].any()
    d_both, d_weights = swiglu_backward(dy, source, weights)
    assert not d_both[2].isfinite().all()
    assert d_weights[2].isfinite() == (place == "weight")
    assert d_both[[0, 1, 3]].isfinite().all()


def test_strided_inputs_equal_their_copies() -> None:
    both, weights, dy = make(6, 130)
    views = (both.t().contiguous().t(), weights.repeat_interleave(2)[::2], dy.t().contiguous().t())
    assert torch.equal(swiglu_quantize(*views[:2]).scales, swiglu_quantize(both, weights).scales)
    found = swiglu_backward(views[2], views[0], views[1])
    for one, other in zip(found, swiglu_backward(dy, both, weights), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(  # a gradient of stride 0
        swiglu_backward(torch.ones(1, 1).expand(6, 130), both)[0],
        swiglu_backward(torch.ones(6, 130), both)[0],
    )


@pytest.mark.parametrize(("rows", "width"), [(0, 200), (5, 0)])
def test_empty_matrices(rows, width) -> None:
    both, weights = torch.empty(rows, 2 * width), torch.ones(rows)
    assert swiglu_quantize(both, weights).shape == (rows, width)
    d_both, d_weights = swiglu_backward(torch.empty(rows, width), quantize_tiles(both), weights)
    assert d_both.shape == both.shape
    assert torch.equal(d_weights, torch.zeros(rows))


def test_inputs_stay_as_they_are() -> None:
    both, weights, dy = make(3, 140)
    copies = [tensor.clone() for tensor in (both, weights, dy)]
    swiglu_quantize(both, weights)
    swiglu_backward(dy, both, weights)
    for now, before in zip((both, weights, dy), copies, strict=True):
        assert torch.equal(now, before)


def test_errors_name_the_fault() -> None:
    both, weights, dy = make(4, 64)
    with pytest.raises(ValueError, match=r"swiglu_quantize: both has shape \(4, 127\).*2F"):
        swiglu_quantize(both[:, 1:])
    with pytest.raises(ValueError, match=r"both has shape \(4,\)"):
        swiglu_quantize(both[:, 0])
    with pytest.raises(TypeError, match=r"both is torch\.float16"):
        swiglu_quantize(both.half())
    with pytest.raises(ValueError, match=r"blocks of \(128, 128\)"):
        swiglu_quantize(quantize_blocks(both))
    with pytest.raises(ValueError, match=r"weights have shape \(3,\).*needs \(4,\)"):
        swiglu_quantize(both, weights[1:])
    with pytest.raises(TypeError, match=r"weights is torch\.float64"):
        swiglu_quantize(both, weights.double())
    with pytest.raises(ValueError, match=r"dy has shape \(4, 63\).*needs \(4, 64\)"):
        swiglu_backward(dy[:, 1:], both)
    with pytest.raises(TypeError, match=r"swiglu_backward: dy is torch\.float64"):
        swiglu_backward(dy.double(), both)
    with pytest.raises(ValueError, match="weights is on meta and both on cpu"):
        swiglu_quantize(Quantized(quantize_tiles(both).codes, torch.ones(4, 1), TILES), weights.to("meta"))


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted_rows.py", "swiglu")
