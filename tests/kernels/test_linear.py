"""The FP8 linear layer: its three GEMMs against float64, and what it keeps for the backward pass."""

import pytest
import torch

from kernels.formats.e5m6 import dequantize_e5m6, quantize_e5m6
from kernels.formats.quantize import dequantize, quantize_blocks, quantize_tiles
from kernels.fused.permute import plan_rows
from kernels.layers.activation import FP8Activation, fp8_activation, permute_fp8
from kernels.layers.grouped_linear import fp8_grouped_linear
from kernels.layers.linear import fp8_linear
from kernels.layers.mlp import fp8_experts, fp8_mlp
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error


def make(tokens: int, n_in: int, n_out: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, n_in, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(n_out, n_in, generator=generator) / n_in**0.5).requires_grad_()
    dy = (torch.randn(tokens, n_out, generator=generator) * 1e-6).to(dtype)
    return x, weight, dy


def saved_by(y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What the layer saved; the node of y itself only gives it its shape."""
    return y.grad_fn.next_functions[0][0].saved_tensors


def through_fp8(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """x after a round trip through 1x128 tiles."""
    return dequantize(quantize_tiles(x, power_of_two=power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("tokens", "n_in", "n_out", "dtype"),
    [
        (1, 128, 128, torch.float32),
        (7, 200, 129, torch.float32),
        (129, 129, 300, torch.bfloat16),
        (300, 256, 100, torch.float32),
    ],
)
def test_output_and_gradients(tokens, n_in, n_out, dtype, power_of_two) -> None:
    x, weight, dy = make(tokens, n_in, n_out, dtype)
    y = fp8_linear(x, weight, power_of_two=power_of_two)
    y.backward(dy)
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)

    x0, w0 = x.detach(), weight.detach()
    # What the recipe says each GEMM multiplies, then multiplied in float64.
    x8 = through_fp8(x0, power_of_two)
    w8 = dequantize(quantize_blocks(w0, power_of_two=power_of_two)).double()
    x8_by_token = through_fp8(x8.t(), power_of_two).double()
    dy8, dy8_by_token = through_fp8(dy, power_of_two).double(), through_fp8(dy.t(), power_of_two).double()
    limit = MAX_ERROR_FP32 if dtype == torch.float32 else MAX_ERROR_BF16
    assert relative_error(y, x8.double() @ w8.t()) < limit
    assert relative_error(x.grad, dy8 @ w8) < limit
    assert relative_error(weight.grad, dy8_by_token @ x8_by_token.t()) < MAX_ERROR_FP32

    # And the cost of FP8 itself: about 2.6% an operand, the activation rounded twice in wgrad.
    x64, w64, dy64 = x0.double(), w0.double(), dy.double()
    assert relative_error(y, x64 @ w64.t()) < 0.06
    assert relative_error(x.grad, dy64 @ w64) < 0.06
    assert relative_error(weight.grad, dy64.t() @ x64) < 0.07


def test_activation_waits_in_fp8() -> None:
    x, weight, _ = make(40, 256, 64)
    y = fp8_linear(x, weight)  # with its last reference the saved tensors would go
    saved = saved_by(y)
    assert [(t.dtype, tuple(t.shape)) for t in saved] == [
        (torch.float8_e4m3fn, (40, 256)),
        (torch.float32, (40, 2)),
        (torch.float32, (64, 256)),
    ]
    assert saved[2].data_ptr() == weight.data_ptr()


def test_keeps_and_computes_only_what_is_needed() -> None:
    x, weight, dy = make(5, 130, 9)
    frozen = fp8_linear(x, weight.detach())
    assert saved_by(frozen)[:2] == (None, None)
    first = fp8_linear(x.detach(), weight)
    assert saved_by(first)[2] is None
    frozen.backward(dy)
    first.backward(dy)
    both_x, both_w = torch.autograd.grad(fp8_linear(x, weight), (x, weight), dy)
    assert torch.equal(x.grad, both_x)
    assert torch.equal(weight.grad, both_w)
    assert not fp8_linear(x.detach(), weight.detach()).requires_grad


def test_gradients_scale_exactly_down_to_tiny_ones() -> None:
    x, weight, dy = make(33, 129, 140)
    normal = torch.autograd.grad(fp8_linear(x, weight), (x, weight), dy)
    tiny = torch.autograd.grad(fp8_linear(x, weight), (x, weight), dy * 2.0**-40)
    for small, large in zip(tiny, normal, strict=True):
        assert large.abs().max() > 0
        assert torch.equal(small, large * 2.0**-40)


def test_power_of_two_scales_make_the_second_rounding_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (1 + 3 * torch.rand(200, 300, generator=generator)) * (
        torch.rand(200, 300, generator=generator) - 0.5
    ).sign()
    cached = through_fp8(x, power_of_two=True)
    assert torch.equal(through_fp8(cached.t(), power_of_two=True), cached.t())
    cached = through_fp8(x, power_of_two=False)
    assert not torch.equal(through_fp8(cached.t(), power_of_two=False), cached.t())


def test_leading_dimensions_and_expanded_gradients() -> None:
    x, weight, _ = make(24, 130, 10)
    y = fp8_linear(x.view(2, 3, 4, 130), weight)
    assert y.shape == (2, 3, 4, 10)
    assert torch.equal(y.view(24, 10), fp8_linear(x, weight))
    torch.testing.assert_close(fp8_linear(x[0], weight), y[0, 0, 0])
    y.sum().backward()  # a gradient of stride 0
    expected = torch.autograd.grad(fp8_linear(x, weight), (x, weight), torch.ones(24, 10))
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


def test_an_expert_without_tokens() -> None:
    x, weight, _ = make(0, 200, 30)
    y = fp8_linear(x, weight)
    y.sum().backward()
    assert y.shape == (0, 30)
    assert x.grad.shape == (0, 200)
    assert torch.equal(weight.grad, torch.zeros(30, 200))


def test_nan_reaches_output_and_gradients() -> None:
    x, weight, dy = make(6, 256, 20)
    with torch.no_grad():
        x[3, 5] = torch.nan
    y = fp8_linear(x, weight)
    y.backward(dy)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5]].isfinite().all()
    assert weight.grad[:, 5].isnan().all()


def test_the_output_of_attention_waits_in_e5m6() -> None:
    """The forward pass reads E4M3; the weight gradient reads what 12 bits kept, quantised once more."""
    x, weight, dy = make(200, 384, 40, torch.bfloat16)
    y = fp8_linear(x, weight, e5m6=True)
    saved = saved_by(y)
    assert [(t.dtype, tuple(t.shape)) for t in saved] == [
        (torch.uint8, (200, 576)),
        (torch.float32, (200, 3)),
        (torch.float32, (40, 384)),
    ]
    y.backward(dy)
    w8 = dequantize(quantize_blocks(weight.detach())).double()
    assert relative_error(y, through_fp8(x.detach(), True).double() @ w8.t()) < MAX_ERROR_BF16
    kept = dequantize_e5m6(quantize_e5m6(x.detach()))
    dy8 = through_fp8(dy.t(), False).double()
    expected = dy8 @ through_fp8(kept.t(), True).double().t()
    assert relative_error(weight.grad, expected) < MAX_ERROR_FP32
    # One rounding to E4M3 instead of two, with nothing else in the way.
    exact = dy8 @ x.detach().double()
    (coarse,) = torch.autograd.grad(fp8_linear(x, weight), weight, dy)
    assert relative_error(weight.grad, exact) < 0.9 * relative_error(coarse, exact)
    with pytest.raises(ValueError, match="e5m6 caches the values"):
        fp8_linear(fp8_activation(x), weight, e5m6=True)


def test_layers_with_one_input_share_its_codes() -> None:
    x, weight, dy = make(30, 256, 64)
    other = weight.detach().flip(0).requires_grad_()
    shared = fp8_activation(x.view(5, 6, 256))
    first, second = fp8_linear(shared, weight), fp8_linear(shared, other)
    assert first.shape == (5, 6, 64)
    assert saved_by(first)[0].data_ptr() == saved_by(second)[0].data_ptr() == shared.tiles.codes.data_ptr()
    assert shared.anchor.untyped_storage().nbytes() == 4
    assert shared.anchor.isnan().all()
    found = torch.autograd.grad((first, second), (x, weight, other), (dy.view(5, 6, 64), dy.view(5, 6, 64)))
    alone = [torch.autograd.grad(fp8_linear(x, w), (x, w), dy) for w in (weight, other)]
    assert torch.equal(found[0], alone[0][0] + alone[1][0])
    assert torch.equal(found[1], alone[0][1])
    assert torch.equal(found[2], alone[1][1])
    plain = fp8_linear(fp8_activation(x.detach()), weight.detach())
    assert not plain.requires_grad
    with pytest.raises(ValueError, match=r"anchor is \(30, 128\)"):
        FP8Activation(shared.tiles, torch.ones(30, 128))
    with pytest.raises(TypeError, match="float64"):
        FP8Activation(shared.tiles, torch.ones(30, 256, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"blocks are \(128, 128\)"):
        FP8Activation(quantize_blocks(x.detach()), x)


@pytest.mark.parametrize("kind", ["linear", "grouped", "mlp", "experts"])
def test_an_activation_in_powers_of_two_is_rounded_once(kind) -> None:
    """Also by layers whose own scales are no powers of two. 1.5 in a tile is 448, and 1.125 then 336, which
    E4M3 has not; in powers of two it has both."""
    x = torch.full((2, 256), 1.5)
    x[0, ::2] = 1.125
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator).requires_grad_()
    down = torch.randn(256, 128, generator=generator)
    offsets = torch.tensor([0, 2])
    sent = fp8_activation(x, power_of_two=True)
    if kind in ("grouped", "experts"):
        sent = permute_fp8(sent, plan_rows(torch.zeros(2, 1, dtype=torch.int64), 1))
    y = {
        "linear": lambda: fp8_linear(sent, weight),
        "grouped": lambda: fp8_grouped_linear(sent, weight[None], offsets),
        "mlp": lambda: fp8_mlp(sent, weight, down),
        "experts": lambda: fp8_experts(sent, weight[None], down[None], offsets),
    }[kind]()
    (dw,) = torch.autograd.grad(y[0].sum(), weight)  # of one token: its gradient times its values
    assert dw.any()
    torch.testing.assert_close(dw[:, ::2], 0.75 * dw[:, 1::2], rtol=1e-6, atol=0)


def test_there_is_no_second_derivative() -> None:
    x, weight, dy = make(4, 128, 8)
    (dx,) = torch.autograd.grad(fp8_linear(x, weight), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"x is \(4, 128\) and weight \(8, 64\)"):
        fp8_linear(torch.ones(4, 128), torch.ones(8, 64))
    with pytest.raises(TypeError, match="float16"):
        fp8_linear(torch.ones(4, 64, dtype=torch.float16), torch.ones(8, 64))
