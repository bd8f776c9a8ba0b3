"""SwiGLU networks in FP8: against float64, and against the single layers that they are made of."""

import itertools

import pytest
import torch
from torch.nn.functional import silu

from kernels.formats.quantize import dequantize, quantize_tiles
from kernels.fused.permute import permute, unpermute
from kernels.layers.activation import fp8_activation, permute_fp8
from kernels.layers.linear import fp8_linear
from kernels.layers.mlp import fp8_experts, fp8_mlp
from kernels.layers.weight import FP8Weights
from kernels.metrics import relative_error

SIZES = [0, 1, 70, 0, 129, 3]


def make(
    sizes: list[int], hidden: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """x, gate_up, down, routing weights, dy and offsets for experts of `sizes` rows."""
    generator = torch.Generator().manual_seed(len(sizes))
    rows, experts = sum(sizes), len(sizes)
    x = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    gate_up = torch.randn(experts, 2 * width, hidden, generator=generator) * 2 / hidden**0.5
    down = torch.randn(experts, hidden, width, generator=generator) / width**0.5
    weights = torch.rand(rows, generator=generator).requires_grad_()
    dy = (torch.randn(rows, hidden, generator=generator) * 1e-6).to(dtype)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return x, gate_up.requires_grad_(), down.requires_grad_(), weights, dy, offsets


def exact(x, gate_up, down, weights):
    gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
    y = (silu(gate) * up) @ down.t()
    return y if weights is None else y * weights[:, None]


def doubles(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("hidden", "width", "dtype"), [(128, 128, torch.float32), (200, 70, torch.bfloat16)])
def test_experts_against_float64(hidden, width, dtype, weighted, power_of_two) -> None:
    x, gate_up, down, weights, dy, offsets = make(SIZES, hidden, width, dtype)
    used = weights if weighted else None
    y = fp8_experts(x, gate_up, down, offsets, used, power_of_two=power_of_two)
    y.backward(dy)
    assert (y.dtype, x.grad.dtype, gate_up.grad.dtype) == (dtype, dtype, torch.float32)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin == end:
            assert not gate_up.grad[e].any()
            assert not down.grad[e].any()
            continue
        leaves = doubles(x[begin:end], gate_up[e], down[e], weights[begin:end])
        expected = exact(*leaves[:3], leaves[3] if weighted else None)
        # Each rounding to E4M3 costs 2.6%; six or seven lie on a path.
        assert relative_error(y[begin:end], expected) < 0.1
        gradients = torch.autograd.grad(expected, leaves if weighted else leaves[:3], dy[begin:end].double())
        found = (x.grad[begin:end], gate_up.grad[e], down.grad[e], weights.grad)[: len(gradients)]
        for one, other in zip(found[:3], gradients[:3], strict=True):
            assert relative_error(one, other) < 0.12
        if weighted:
            assert relative_error(weights.grad[begin:end], gradients[3]) < 0.3
    if not weighted:
        assert weights.grad is None


def test_experts_are_single_layers_but_for_the_rounding_of_their_cache() -> None:
    """With inputs of SwiGLU that FP8 holds exactly, the network is its layers, gradients included."""
    x, gate_up, down, weights, dy, offsets = make(SIZES, 256, 128)
    y = fp8_experts(x, gate_up, down, offsets, weights)
    found = torch.autograd.grad(y, (x, gate_up, down, weights), dy)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin == end:
            continue
        leaves = [
            t.detach().requires_grad_() for t in (x[begin:end], gate_up[e], down[e], weights[begin:end])
        ]
        both = fp8_linear(leaves[0], leaves[1])
        # A value that goes forward as it is and back as the cache has it.
        cached = both + (dequantize(quantize_tiles(both.detach())) - both).detach()
        for inner, limit in ((both, 0.08), (cached, 0.02)):
            gate, up = inner.chunk(2, dim=-1)
            alone = fp8_linear(silu(gate) * up * leaves[3][:, None], leaves[2])
            if inner is both:
                # Codes next to a midpoint may differ, since the exponentials do.
                assert relative_error(y[begin:end], alone.double()) < 2e-3
            gradients = torch.autograd.grad(alone, leaves, dy[begin:end], retain_graph=True)
            parts = (found[0][begin:end], found[1][e], found[2][e], found[3][begin:end])
            for one, other in zip(parts, gradients, strict=True):
                assert relative_error(one, other.double()) < limit


def test_dense_is_one_expert_with_all_rows() -> None:
    x, gate_up, down, _, dy, _ = make([150], 200, 130, torch.bfloat16)
    whole = torch.autograd.grad(fp8_experts(x, gate_up, down, torch.tensor([0, 150])), (x, gate_up, down), dy)
    dense = [gate_up.detach()[0].requires_grad_(), down.detach()[0].requires_grad_()]
    y = fp8_mlp(x.view(3, 50, 200), *dense)
    assert y.shape == (3, 50, 200)
    found = torch.autograd.grad(y, (x, *dense), dy.view(3, 50, 200))
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], whole[1][0])
    assert torch.equal(found[2], whole[2][0])


def test_codes_that_were_sent_are_those_made_here() -> None:
    """Quantised before the dispatch, a token's codes are the same in every copy; gradients add up in it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 200, generator=generator).requires_grad_()
    chosen = torch.rand(40, 5, generator=generator).topk(3, dim=1).indices
    _, gate_up, down, _, _, _ = make([1] * 5, 200, 70)
    dy = torch.randn(40, 200, generator=generator)
    rows, plan = permute(x, chosen, 5)
    expected = unpermute(fp8_experts(rows, gate_up, down, plan.offsets, power_of_two=True), plan)
    sent = permute_fp8(fp8_activation(x, power_of_two=True), plan)
    assert sent.anchor.untyped_storage().nbytes() == 4
    found = unpermute(fp8_experts(sent, gate_up, down, plan.offsets, power_of_two=True), plan)
    assert torch.equal(found, expected)
    leaves = (x, gate_up, down)
    for one, other in zip(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="the plan is for 40 tokens"):
        permute_fp8(sent, plan)


def test_scales_of_weights_and_activations_are_chosen_apart() -> None:
    x, gate_up, down, weights, _, offsets = make(SIZES, 200, 70)
    read = (x, gate_up, down, offsets, weights)
    mixed = fp8_experts(*read, power_of_two=True, weight_power_of_two=False)
    for power_of_two in (False, True):
        with FP8Weights(power_of_two=power_of_two) as scope:
            copied = fp8_experts(*read, power_of_two=True, copies=(scope.of(gate_up), scope.of(down)))
        assert torch.equal(copied, mixed) == (not power_of_two)
        assert torch.equal(copied, fp8_experts(*read, power_of_two=True)) == power_of_two


def test_no_rows_and_rows_of_no_expert() -> None:
    x, gate_up, down, weights, _, offsets = make([0, 0], 200, 70)
    y = fp8_experts(x, gate_up, down, offsets, weights)
    y.sum().backward()
    assert (y.shape, x.grad.shape, weights.grad.shape) == ((0, 200), (0, 200), (0,))
    assert not gate_up.grad.any()
    assert not down.grad.any()
    empty = fp8_mlp(torch.ones(2, 0, 200), gate_up[0], down[0])
    assert empty.shape == (2, 0, 200)

    x, gate_up, down, weights, dy, offsets = make([4, 5, 6], 200, 70)
    whole = torch.autograd.grad(
        fp8_experts(x, gate_up, down, offsets, weights), (x, gate_up, down, weights), dy
    )
    nan = torch.full((9, 200), torch.nan)
    longer = torch.cat([x.detach(), nan]).requires_grad_()
    more = torch.cat([weights.detach(), torch.full((9,), 0.5)]).requires_grad_()
    y = fp8_experts(longer, gate_up, down, offsets, more)
    found = torch.autograd.grad(y, (longer, gate_up, down, more), torch.cat([dy, nan]))
    assert torch.equal(y[15:], torch.zeros(9, 200))
    assert torch.equal(found[0], torch.cat([whole[0], torch.zeros(9, 200)]))
    assert torch.equal(found[1], whole[1])
    assert torch.equal(found[2], whole[2])
    assert torch.equal(found[3], torch.cat([whole[3], torch.zeros(9)]))


@pytest.mark.parametrize("place", ["x", "gate_up", "down", "weight"])
def test_nan_reaches_what_it_touches(place) -> None:
    x, gate_up, down, weights, dy, offsets = make([4, 6], 256, 130)
    with torch.no_grad():
        {"x": x[5], "gate_up": gate_up[1, 3], "down": down[1, 3], "weight": weights[5:6]}[place][0] = (
            torch.nan
        )
    y = fp8_experts(x, gate_up, down, offsets, weights)
    y.backward(dy)
    assert y[:4].isfinite().all()
    assert gate_up.grad[0].isfinite().all()
    assert y[5].isnan().any()
    assert down.grad[1].isnan().any() == (place != "down")
    assert x.grad[5].isnan().any()


def test_errors_name_the_fault() -> None:
    x, gate_up, down, weights, _, offsets = make([4, 6], 128, 64)
    with pytest.raises(ValueError, match=r"gate_up \(2, 128, 128\) and down \(2, 128, 63\)"):
        fp8_experts(x, gate_up, down[..., 1:], offsets)
    with pytest.raises(ValueError, match=r"fp8_mlp: x is \(10, 128\), gate_up \(2, 128, 128\)"):
        fp8_mlp(x, gate_up, down)
    with pytest.raises(ValueError, match="3 offsets and 1 experts"):
        fp8_experts(x, gate_up[:1], down[:1], offsets)
    with pytest.raises(ValueError, match="rise from 0"):
        fp8_experts(x, gate_up, down, offsets.flip(0))
    with pytest.raises(ValueError, match=r"weights have shape \(9,\)"):
        fp8_experts(x, gate_up, down, offsets, weights[1:])
    with pytest.raises(ValueError, match="gate_up on meta"):
        fp8_experts(x, gate_up.to("meta"), down, offsets)
    with pytest.raises(TypeError, match="float16"):
        fp8_experts(x.half(), gate_up, down, offsets)
