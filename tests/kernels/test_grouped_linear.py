"""The grouped FP8 linear layer: against float64, against one `fp8_linear` for each expert, and its memory."""

import itertools

import pytest
import torch

from kernels.formats.quantize import dequantize, quantize_blocks, quantize_tiles
from kernels.layers.grouped_linear import fp8_grouped_linear
from kernels.layers.linear import fp8_linear
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error

SIZES = [0, 1, 7, 129, 0, 128, 3, 0]


def make(
    sizes: list[int], n_in: int, n_out: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """x, weight, dy and offsets for experts of `sizes` tokens."""
    generator = torch.Generator().manual_seed(sum(sizes))
    tokens = sum(sizes)
    x = torch.randn(tokens, n_in, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(len(sizes), n_out, n_in, generator=generator) / n_in**0.5).requires_grad_()
    dy = (torch.randn(tokens, n_out, generator=generator) * 1e-6).to(dtype)
    return x, weight, dy, torch.tensor([0, *itertools.accumulate(sizes)])


def through_fp8(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """x after a round trip through 1x128 tiles."""
    return dequantize(quantize_tiles(x, power_of_two=power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("sizes", "n_in", "n_out", "dtype"),
    [
        ([1], 128, 128, torch.float32),
        (SIZES, 200, 129, torch.float32),
        (SIZES, 129, 256, torch.bfloat16),
        ([300, 100], 256, 100, torch.float32),
    ],
)
def test_output_and_gradients(sizes, n_in, n_out, dtype, power_of_two) -> None:
    x, weight, dy, offsets = make(sizes, n_in, n_out, dtype)
    y = fp8_grouped_linear(x, weight, offsets, power_of_two=power_of_two)
    y.backward(dy)
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)

    limit = MAX_ERROR_FP32 if dtype == torch.float32 else MAX_ERROR_BF16
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        x0, dy0, w0 = x.detach()[begin:end], dy[begin:end], weight.detach()[e]
        if begin == end:
            assert torch.equal(weight.grad[e], torch.zeros_like(w0))
            continue
        # What the recipe says each GEMM multiplies, then multiplied in float64.
        x8, dy8 = through_fp8(x0, power_of_two), through_fp8(dy0, power_of_two).double()
        w8 = dequantize(quantize_blocks(w0, power_of_two=power_of_two)).double()
        x8_by_token = through_fp8(x8.t(), power_of_two).double()
        dy8_by_token = through_fp8(dy0.t(), power_of_two).double()
        assert relative_error(y[begin:end], x8.double() @ w8.t()) < limit
        assert relative_error(x.grad[begin:end], dy8 @ w8) < limit
        assert relative_error(weight.grad[e], dy8_by_token @ x8_by_token.t()) < MAX_ERROR_FP32
        # And the cost of FP8 itself.
        x64, w64, dy64 = x0.double(), w0.double(), dy0.double()
        assert relative_error(y[begin:end], x64 @ w64.t()) < 0.06
        assert relative_error(x.grad[begin:end], dy64 @ w64) < 0.06
        assert relative_error(weight.grad[e], dy64.t() @ x64) < 0.07


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_one_linear_for_each_expert(dtype) -> None:
    """To the bit. Of small integers every product and sum is exact, in whatever order a CPU adds them up."""
    _, _, _, offsets = make(SIZES, 200, 130)
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(SIZES), 200), (len(SIZES), 130, 200), (sum(SIZES), 130))
    x, weight, dy = (torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes)
    x, dy = x.to(dtype).requires_grad_(), dy.to(dtype)
    weight.requires_grad_()
    y = fp8_grouped_linear(x, weight, offsets.int(), power_of_two=True)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert y.any()
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        leaves = (x.detach()[begin:end].requires_grad_(), weight.detach()[e].requires_grad_())
        alone = fp8_linear(*leaves, power_of_two=True)
        dx_alone, dw_alone = torch.autograd.grad(alone, leaves, dy[begin:end])
        assert torch.equal(y[begin:end], alone)
        assert torch.equal(dx[begin:end], dx_alone)
        assert torch.equal(dw[e], dw_alone)


def test_activation_waits_in_fp8() -> None:
    x, weight, _, offsets = make([10, 30], 256, 64)
    y = fp8_grouped_linear(x, weight, offsets)  # with its last reference the saved tensors would go
    saved = y.grad_fn.saved_tensors
    assert [(t.dtype, tuple(t.shape)) for t in saved] == [
        (torch.float8_e4m3fn, (40, 256)),
        (torch.float32, (40, 2)),
        (torch.float32, (2, 64, 256)),
    ]
    assert saved[2].data_ptr() == weight.data_ptr()


def test_keeps_and_computes_only_what_is_needed() -> None:
    x, weight, dy, offsets = make([5, 0, 2], 130, 9)
    frozen = fp8_grouped_linear(x, weight.detach(), offsets)
    assert frozen.grad_fn.saved_tensors[:2] == (None, None)
    first = fp8_grouped_linear(x.detach(), weight, offsets)
    assert first.grad_fn.saved_tensors[2] is None
    frozen.backward(dy)
    first.backward(dy)
    both_x, both_w = torch.autograd.grad(fp8_grouped_linear(x, weight, offsets), (x, weight), dy)
    assert torch.equal(x.grad, both_x)
    assert torch.equal(weight.grad, both_w)
    assert not fp8_grouped_linear(x.detach(), weight.detach(), offsets).requires_grad


def test_tiny_gradients_beside_large_ones() -> None:
    """Neighbours by expert share no scale: an expert's tiny gradients keep their digits."""
    x, weight, dy, offsets = make([60, 60], 128, 40)
    scaled = dy.clone()
    scaled[60:] *= 2.0**-60
    plain, mixed = (
        torch.autograd.grad(fp8_grouped_linear(x, weight, offsets), (x, weight), gradient)
        for gradient in (dy, scaled)
    )
    assert torch.equal(mixed[1][0], plain[1][0])
    assert torch.equal(mixed[1][1], plain[1][1] * 2.0**-60)
    assert torch.equal(mixed[0][60:], plain[0][60:] * 2.0**-60)


def test_no_tokens_and_rows_of_no_expert() -> None:
    x, weight, _, offsets = make([0, 0, 0], 200, 30)
    y = fp8_grouped_linear(x, weight, offsets)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == ((0, 30), (0, 200))
    assert torch.equal(weight.grad, torch.zeros(3, 30, 200))

    x, weight, dy, offsets = make([4, 5, 6], 200, 30)
    whole = torch.autograd.grad(fp8_grouped_linear(x, weight, offsets), (x, weight), dy)
    longer = torch.cat([x.detach(), torch.full((9, 200), torch.nan)]).requires_grad_()
    y = fp8_grouped_linear(longer, weight, offsets)
    dx, dw = torch.autograd.grad(y, (longer, weight), torch.cat([dy, torch.full((9, 30), torch.nan)]))
    assert torch.equal(y[15:], torch.zeros(9, 30))
    assert torch.equal(dx, torch.cat([whole[0], torch.zeros(9, 200)]))
    assert torch.equal(dw, whole[1])


def test_expanded_gradients_and_bf16_weights() -> None:
    x, weight, _, offsets = make([3, 9], 130, 10, torch.bfloat16)
    half = weight.detach().bfloat16().requires_grad_()
    fp8_grouped_linear(x, half, offsets).sum().backward()  # a gradient of stride 0
    y = fp8_grouped_linear(x, half, offsets)
    expected = torch.autograd.grad(y, (x, half), torch.ones(12, 10, dtype=torch.bfloat16))
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(half.grad, expected[1])


def test_nan_stays_with_its_token_and_expert() -> None:
    x, weight, dy, offsets = make([4, 6], 256, 20)
    with torch.no_grad():
        x[5, 5] = torch.nan
    y = fp8_grouped_linear(x, weight, offsets)
    y.backward(dy)
    assert y[5].isnan().all()
    assert y[[0, 1, 2, 3, 4, 6, 7, 8, 9]].isfinite().all()
    assert weight.grad[0].isfinite().all()
    assert weight.grad[1, :, 5].isnan().all()


def test_there_is_no_second_derivative() -> None:
    x, weight, dy, offsets = make([4], 128, 8)
    y = fp8_grouped_linear(x, weight, offsets)
    (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_errors_name_the_fault() -> None:
    offsets = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"x is \(4, 128\) and weight \(1, 8, 64\)"):
        fp8_grouped_linear(torch.ones(4, 128), torch.ones(1, 8, 64), offsets)
    with pytest.raises(ValueError, match=r"x is \(4, 64\) and weight \(8, 64\)"):
        fp8_grouped_linear(torch.ones(4, 64), torch.ones(8, 64), offsets)
    with pytest.raises(ValueError, match="offsets on meta"):
        fp8_grouped_linear(torch.ones(4, 64), torch.ones(1, 8, 64), offsets.to("meta"))
    with pytest.raises(ValueError, match="2 offsets and 3 experts"):
        fp8_grouped_linear(torch.ones(4, 64), torch.ones(3, 8, 64), offsets)
    with pytest.raises(TypeError, match="float16"):
        fp8_grouped_linear(torch.ones(4, 64, dtype=torch.float16), torch.ones(1, 8, 64), offsets)
