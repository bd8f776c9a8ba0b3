"""Fused RMSNorm against float64, against its unfused parts, and its Triton logic by the interpreter."""

import math

import numpy as np
import pytest
import torch

from kernels.formats.quantize import TILES, dequantize, quantize_tiles
from kernels.fused.norm import rmsnorm_backward, rmsnorm_quantize
from kernels.metrics import MAX_ERROR_BF16, relative_error
from tests.kernels.interpreter import needs_interpreter, run_interpreted

EPS = 1e-6
WIDTHS = [1, 127, 128, 576, 1100, 7168, 8192]


def make(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x and dy [rows, cols] and weight [cols]; rows of x differ in size."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(rows, cols, generator=generator) * 10.0 ** torch.randint(
        -2, 3, (rows, 1), generator=generator
    )
    weight = 1 + torch.randn(cols, generator=generator) / 4
    return x.to(dtype), torch.randn(rows, cols, generator=generator).to(dtype), weight.to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.double(), x.shape[1:], weight.double(), EPS)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", WIDTHS)
def test_output_is_the_unfused_one(cols, dtype, power_of_two) -> None:
    x, _, weight = make(7, cols, dtype)
    found, inverse = rmsnorm_quantize(x, weight, EPS, power_of_two=power_of_two)
    normed = exact(x, weight)
    expected = quantize_tiles(normed.float(), power_of_two=power_of_two)
    assert (found.block, found.shape) == (TILES, (7, cols))
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-6, atol=0)
    # A value within rounding of a midpoint may fall on the other side of it: at most one code away.
    apart = found.codes.view(torch.uint8).int() - expected.codes.view(torch.uint8).int()
    assert apart.abs().max() <= 1
    assert apart.ne(0).float().mean() < 1e-3 + 1 / apart.numel()
    assert relative_error(dequantize(found), normed) < 0.04
    rms = x.double().square().mean(dim=1).add(EPS).sqrt()
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse.double(), 1 / rms, rtol=5e-7, atol=0)


@pytest.mark.parametrize("cols", WIDTHS)
def test_gradients_against_float64(cols) -> None:
    x, dy, weight = make(7, cols)
    _, inverse = rmsnorm_quantize(x, weight, EPS)
    leaves = (x.double().requires_grad_(), weight.double().requires_grad_())
    expected = torch.autograd.grad(exact(*leaves), leaves, dy.double())
    dx, dweight = rmsnorm_backward(dy, x, weight, inverse)
    # Of a row of one value almost the whole gradient cancels: it is judged beside what cancels.
    size = (dy * weight * inverse[:, None]).double().norm()
    assert (dx - expected[0]).norm() / size < 1e-6
    assert relative_error(dweight, expected[1]) < 1e-6
    if cols > 1:
        assert relative_error(dx, expected[0]) < 1e-6


def test_the_inverse_is_rounded_at_every_step() -> None:
    """The mean of one column is its square: what is left are the root and the division."""
    x = torch.logspace(-12, 12, 100_000)[:, None]
    _, inverse = rmsnorm_quantize(x, torch.ones(1), EPS)
    mean = x[:, 0].numpy() ** 2 + np.float32(EPS)
    assert mean.dtype == np.float32
    root = np.array([math.sqrt(value) for value in mean.tolist()]).astype(np.float32)
    assert np.array_equal(inverse.numpy(), np.float32(1) / root)


def test_types_of_the_gradients() -> None:
    x, dy, weight = make(5, 300, torch.bfloat16)
    _, inverse = rmsnorm_quantize(x, weight.float(), EPS)
    dx, dweight = rmsnorm_backward(dy, x, weight.float(), inverse)
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    wide = rmsnorm_backward(dy.float(), x, weight, inverse)
    assert (wide[0].dtype, wide[1].dtype) == (torch.float32, torch.bfloat16)
    assert relative_error(dx, wide[0].double()) < MAX_ERROR_BF16


def test_an_outlier_costs_precision_in_its_own_tile_only() -> None:
    x, _, weight = make(3, 384)
    x[0, 5] = x[0].abs().max() * 1e6
    found, expected = dequantize(rmsnorm_quantize(x, weight, 1e-30)[0]), exact(x, weight)
    assert relative_error(found[0, 6:128], expected[0, 6:128]) > 0.5
    assert relative_error(found[0, 128:], expected[0, 128:]) < 0.04
    assert relative_error(found[1:], expected[1:]) < 0.04


def test_zero_rows_have_scale_one_and_a_finite_inverse() -> None:
    weight = torch.ones(200)
    found, inverse = rmsnorm_quantize(torch.zeros(3, 200), weight, EPS)
    assert found.scales.eq(1).all()
    assert dequantize(found).eq(0).all()
    torch.testing.assert_close(inverse, torch.full((3,), 1e3))
    dx, dweight = rmsnorm_backward(torch.ones(3, 200), torch.zeros(3, 200), weight, inverse)
    torch.testing.assert_close(dx, torch.full((3, 200), 1e3))
    assert dweight.eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_a_row_without_a_finite_sum_of_squares_is_nan_as_a_whole(bad) -> None:
    x, dy, weight = make(4, 300)
    x[2, 140] = bad
    found, inverse = rmsnorm_quantize(x, weight, EPS)
    spoiled = dequantize(found).isnan()
    assert spoiled[2].all()
    assert not spoiled[[0, 1, 3]].any()
    assert inverse.isnan().tolist() == [False, False, True, False]
    dx, dweight = rmsnorm_backward(dy, x, weight, inverse)
    assert dx[2].isnan().all()
    assert dx[[0, 1, 3]].isfinite().all()
    assert dweight.isnan().all()


def test_a_nan_weight_spoils_its_tiles_only() -> None:
    x, _, weight = make(4, 300)
    weight[140] = torch.nan
    spoiled = dequantize(rmsnorm_quantize(x, weight, EPS)[0]).isnan()
    assert spoiled[:, 128:256].all()
    assert not spoiled[:, :128].any()
    assert not spoiled[:, 256:].any()


def test_strided_inputs_equal_their_copies() -> None:
    x, dy, weight = make(6, 130)
    view, strided = x.t().contiguous().t(), weight.repeat_interleave(2)[::2]
    found, expected = rmsnorm_quantize(view, strided, EPS), rmsnorm_quantize(x, weight, EPS)
    assert torch.equal(found[0].codes.view(torch.uint8), expected[0].codes.view(torch.uint8))
    assert torch.equal(found[1], expected[1])
    gradients = rmsnorm_backward(dy.t().contiguous().t(), view, strided, found[1])
    assert torch.equal(gradients[0], rmsnorm_backward(dy, x, weight, found[1])[0])


@pytest.mark.parametrize("shape", [(0, 200), (5, 0), (0, 0)])
def test_empty_matrices(shape) -> None:
    x, weight = torch.empty(shape), torch.ones(shape[1])
    found, inverse = rmsnorm_quantize(x, weight, EPS)
    assert found.shape == shape
    assert inverse.shape == (shape[0],)
    dx, dweight = rmsnorm_backward(x, x, weight, inverse)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[1]))


def test_inputs_stay_as_they_are() -> None:
    x, dy, weight = make(3, 140)
    copies = [tensor.clone() for tensor in (x, dy, weight)]
    _, inverse = rmsnorm_quantize(x, weight, EPS)
    rmsnorm_backward(dy, x, weight, inverse)
    for now, before in zip((x, dy, weight), copies, strict=True):
        assert torch.equal(now, before)


def test_errors_name_the_fault() -> None:
    x, dy, weight = make(4, 64)
    with pytest.raises(ValueError, match=r"rmsnorm_quantize: x has shape \(64,\)"):
        rmsnorm_quantize(x[0], weight, EPS)
    with pytest.raises(TypeError, match=r"x is torch\.float16"):
        rmsnorm_quantize(x.half(), weight, EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(63,\).*needs \(64,\)"):
        rmsnorm_quantize(x, weight[1:], EPS)
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        rmsnorm_quantize(x, weight.double(), EPS)
    with pytest.raises(ValueError, match="weight is on meta and x on cpu"):
        rmsnorm_quantize(x, weight.to("meta"), EPS)
    for eps in (0.0, -1.0, 1e-46, 1e39, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps is"):
            rmsnorm_quantize(x, weight, eps)
    inverse = torch.ones(4)
    with pytest.raises(ValueError, match=r"rmsnorm_backward: dy has shape \(4, 63\)"):
        rmsnorm_backward(dy[:, 1:], x, weight, inverse)
    with pytest.raises(ValueError, match=r"inverse is torch\.float32 \(3,\)"):
        rmsnorm_backward(dy, x, weight, inverse[1:])
    with pytest.raises(ValueError, match=r"inverse is torch\.float64"):
        rmsnorm_backward(dy, x, weight, inverse.double())


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted_rows.py", "norm")
