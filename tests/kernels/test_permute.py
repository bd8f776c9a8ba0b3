"""Permute and unpermute against loops and autograd in float64."""

import pytest
import torch

from kernels.formats.quantize import dequantize, quantize_blocks, quantize_tiles
from kernels.fused.permute import permute, plan_rows, unpermute
from kernels.metrics import relative_error


def routed(tokens: int, slots: int, count: int, seed: int = 0) -> torch.Tensor:
    """Experts [tokens, slots], different within a token as long as there are enough."""
    generator = torch.Generator().manual_seed(seed)
    if slots <= count:
        return torch.rand(tokens, count, generator=generator).argsort(dim=1)[:, :slots]
    return torch.randint(count, (tokens, slots), generator=generator)


def layer(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A layer whose expert e multiplies by e + 1, without any permutation."""
    return sum(weights[:, k, None] * x * (experts[:, k, None] + 1) for k in range(experts.shape[1]))


@pytest.mark.parametrize(
    ("tokens", "slots", "count"), [(1, 1, 1), (7, 1, 4), (5, 8, 8), (33, 8, 256), (64, 3, 5), (9, 2, 1)]
)
def test_rows_are_sorted_by_expert_and_stable(tokens, slots, count) -> None:
    experts = routed(tokens, slots, count)
    x = torch.randn(tokens, 6)
    rows, plan = permute(x, experts.int(), count)
    pairs = sorted(range(tokens * slots), key=lambda pair: int(experts.reshape(-1)[pair]))
    assert plan.pair.tolist() == pairs
    assert torch.equal(rows, x[torch.tensor(pairs) // slots])
    assert plan.place.reshape(-1)[plan.pair].tolist() == list(range(tokens * slots))
    sizes = [int((experts == expert).sum()) for expert in range(count)]
    assert plan.offsets.diff().tolist() == sizes
    assert plan.offsets[0] == 0


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (13, 7), (40, 1030)])
def test_layer_and_gradients_against_float64(tokens, hidden, slots) -> None:
    generator = torch.Generator().manual_seed(1)
    experts = routed(tokens, slots, 11)
    leaves = [
        torch.randn(tokens, hidden, generator=generator).requires_grad_(),
        torch.rand(tokens, slots, generator=generator).requires_grad_(),
    ]
    grad = torch.randn(tokens, hidden, generator=generator)
    rows, plan = permute(leaves[0], experts, 11)
    by_row = experts.reshape(-1)[plan.pair]
    out = unpermute(rows * (by_row[:, None] + 1), plan, leaves[1])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = layer(exact[0], experts, exact[1])
    assert relative_error(out, expected) < 1e-6
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(expected, exact, grad.double()),
        strict=True,
    ):
        assert relative_error(found, wanted) < 1e-6


def test_sums_are_fp32_over_slots_in_order() -> None:
    """In BF16, or in another order, the small weights would be lost."""
    y = torch.ones(4, 3, dtype=torch.bfloat16)
    weights = torch.tensor([[2.0**-23, 2.0**-23, 1.0, -1.0]])
    plan = plan_rows(torch.tensor([[3, 1, 2, 0]]), 4)
    assert unpermute(y, plan, weights).tolist() == [[2.0**-22] * 3]
    weights = weights.flip(1)
    assert unpermute(y, plan, weights).tolist() == [[2.0**-22] * 3]
    weights = torch.tensor([[1.0, 2.0**-25, 2.0**-25, -1.0]])
    assert unpermute(y, plan, weights).tolist() == [[0.0] * 3]


def test_types_follow_their_tensors() -> None:
    x = torch.randn(6, 9, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(6, 2, requires_grad=True)
    rows, plan = permute(x, routed(6, 2, 3), 3)
    out = unpermute(rows, plan, weights)
    assert rows.dtype == out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert weights.grad.dtype == torch.float32
    frozen = unpermute(rows.detach(), plan, weights)
    assert torch.equal(torch.autograd.grad(frozen.sum(), weights)[0], weights.grad)
    frozen = unpermute(rows, plan, weights.detach())
    assert torch.equal(torch.autograd.grad(frozen.sum(), x)[0], x.grad)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_move(shape) -> None:
    x = torch.empty(shape, requires_grad=True)
    weights = torch.ones(shape[0], 2, requires_grad=True)
    rows, plan = permute(x, torch.zeros(shape[0], 2, dtype=torch.long), 4)
    assert rows.shape == (2 * shape[0], shape[1])
    assert plan.offsets.tolist() == [0] + [2 * shape[0]] * 4
    out = unpermute(rows, plan, weights)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert torch.equal(weights.grad, torch.zeros(shape[0], 2))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (7, 129), (20, 300)])
def test_fp8_rows_move_with_their_scales(shape) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.arange(shape[0])[:, None]
    if shape[0] > 3:
        x[3, 128] = torch.nan
    q, experts = quantize_tiles(x), routed(shape[0], 2, 5)
    found, plan = permute(q, experts, 5)
    assert torch.equal(plan.pair, plan_rows(experts, 5).pair)
    token = plan.pair // 2
    assert torch.equal(found.codes.view(torch.uint8), q.codes.view(torch.uint8)[token])
    assert torch.equal(found.scales.view(torch.int32), q.scales.view(torch.int32)[token])
    # And so they stand for the permuted values.
    assert torch.equal(dequantize(found).nan_to_num(), permute(dequantize(q), experts, 5)[0].nan_to_num())


def test_strided_input() -> None:
    x, weights = torch.randn(5, 8).t(), torch.rand(2, 8).t()
    rows, plan = permute(x, routed(8, 2, 3), 3)
    same, _ = permute(x.contiguous(), routed(8, 2, 3), 3)
    assert torch.equal(rows, same)
    assert torch.equal(unpermute(rows, plan, weights), unpermute(same, plan, weights.contiguous()))


def test_bad_input_is_named() -> None:
    x, experts = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.long)
    rows, plan = permute(x, experts, 2)
    with pytest.raises(ValueError, match="permute: x has shape"):
        permute(torch.ones(3), experts, 2)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        permute(x.double(), experts, 2)
    with pytest.raises(ValueError, match=r"permute: x is quantised in blocks of \(128, 128\)"):
        permute(quantize_blocks(x), experts, 2)
    with pytest.raises(ValueError, match="x has 2 tokens and experts 3"):
        permute(quantize_tiles(x[:2]), experts, 2)
    with pytest.raises(ValueError, match="K from 1 to 8"):
        permute(x, torch.zeros(3, 9, dtype=torch.long), 2)
    with pytest.raises(TypeError, match=r"experts are torch\.float32"):
        permute(x, experts.float(), 2)
    with pytest.raises(ValueError, match="count is 0"):
        permute(x, experts, 0)
    with pytest.raises(ValueError, match="from 0 to 2; they must lie in 0 to 1"):
        permute(x, torch.tensor([[0, 1], [2, 0], [0, 1]]), 2)
    with pytest.raises(ValueError, match="x has 2 tokens and experts 3"):
        permute(x[:2], experts, 2)
    with pytest.raises(ValueError, match="the plan on cpu"):
        permute(x.to("meta"), experts, 2)
    with pytest.raises(ValueError, match=r"the plan needs 6 and \(3, 2\)"):
        unpermute(rows[:5], plan, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"the plan needs 6 and \(3, 2\)"):
        unpermute(rows, plan, torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"weights is torch\.int64"):
        unpermute(rows, plan, experts)
