"""Grouped experts against a loop over tokens: nothing is dropped, padded or mixed up."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.experts import RoutedExperts
from model.moe import MoE
from model.precision import Precision
from tests.model.tiny import TINY, relative, tiny


def naive(moe: MoE, x_SD: Tensor) -> Tensor:
    """Every token on its own, every chosen expert on its own, in float64."""
    routing = moe.gate(x_SD[None].float())
    gate_up, down = (w.double() for w in (moe.experts.gate_up_proj, moe.experts.down_proj))
    scores = (x_SD @ moe.gate.weight.double().t()).sigmoid()
    rows = []
    for token, x in enumerate(x_SD):
        picked = routing.experts_SK[token]
        weights = scores[token, picked] / scores[token, picked].sum() * TINY.routed_scaling_factor
        gate, up = (moe.shared_experts.gate_up_proj.double() @ x).chunk(2)
        y = moe.shared_experts.down_proj.double() @ (F.silu(gate) * up)
        for expert, weight in zip(picked, weights, strict=True):
            gate, up = (gate_up[expert] @ x).chunk(2)
            y = y + weight * (down[expert] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("crowd", [False, True], ids=["spread", "all to few experts"])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(crowd):
    moe: MoE = tiny().layers[1].mlp.train()
    if crowd:  # Groups 0 and 1 only: half of the experts stay empty, the others take every token.
        moe.gate.e_score_correction_bias.copy_(torch.tensor([5.0] * 6 + [-5.0] * 6))
    x = torch.randn(2, 17, TINY.hidden_size, generator=torch.Generator().manual_seed(5)).requires_grad_()
    aim = torch.randn(2, 17, TINY.hidden_size, generator=torch.Generator().manual_seed(6))
    y, routing = moe(x)
    assert int(routing.load_E.sum()) == 2 * 17 * 3
    assert int((routing.load_E == 0).sum()) >= (6 if crowd else 0)
    (y * aim).sum().backward()
    found = {name: p.grad.clone() for name, p in moe.named_parameters()} | {"x": x.grad.clone()}
    moe.zero_grad()
    x64 = x.detach().double().requires_grad_()
    expected = naive(moe, x64.flatten(0, 1)).view(2, 17, -1)
    assert relative(y.double(), expected) < 1e-5
    (expected * aim.double()).sum().backward()
    assert relative(found.pop("x").double(), x64.grad) < 1e-5
    for name, parameter in moe.named_parameters():
        assert relative(found[name], parameter.grad) < 1e-4, name
    if crowd:
        assert not found["experts.down_proj"][6:].any()


@pytest.mark.parametrize("counts", [[0, 5, 0, 2], [7, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_empty_experts_take_part_without_a_row(counts):
    experts = RoutedExperts(4, 6, 3, Precision())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(7))
    x = torch.randn(sum(counts), 6, generator=torch.Generator().manual_seed(8)).requires_grad_()
    y = experts(x, counts)
    assert y.shape == (sum(counts), 6)
    # An expanded gradient (of a plain sum) has no strides of its own.
    y.sum().backward()
    for expert, count in enumerate(counts):
        assert bool(experts.gate_up_proj.grad[expert].any()) == (count > 0)
        assert bool(experts.down_proj.grad[expert].any()) == (count > 0)
    assert x.grad.shape == x.shape


def test_the_written_gradient_of_the_grouped_product_is_right():
    experts = RoutedExperts(3, 4, 5, Precision()).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(9))
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10)).requires_grad_()

    def product(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(
            experts, {"gate_up_proj": gate_up, "down_proj": down}, (x, [4, 0, 2])
        )

    assert torch.autograd.gradcheck(product, (x, experts.gate_up_proj, experts.down_proj))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp8", 0.15)])
def test_other_precisions_stay_near_and_train_empty_experts_too(precision, tolerance):
    exact, rounded = (tiny(precision=name).layers[1].mlp.train() for name in ("fp32", precision))
    for moe in (exact, rounded):
        moe.gate.e_score_correction_bias.copy_(torch.tensor([5.0] * 6 + [-5.0] * 6))
    x = torch.randn(2, 17, TINY.hidden_size, generator=torch.Generator().manual_seed(11)).bfloat16()
    expected, _ = exact(x.float())
    found, _ = rounded(x)
    assert found.dtype == torch.bfloat16
    error = (found.detach().float() - expected.detach()).norm() / expected.detach().norm()
    assert float(error) < tolerance
    found.float().square().sum().backward()
    assert rounded.experts.gate_up_proj.grad.dtype == torch.float32
    assert torch.isfinite(rounded.experts.gate_up_proj.grad).all()
    assert not rounded.experts.down_proj.grad[6:].any()


def test_several_threads_give_the_same_gradients_every_time():
    """The rows of a token's experts are added going back: in one order, whichever thread is first."""
    moe = tiny(num_experts_per_tok=6, topk_group=4).layers[1].mlp.train()
    x = torch.randn(64, 32, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (2, 2, 2, 4, 4, 4):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            moe(leaf)[0].square().sum().backward()
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(before)
    for first, *others in (found[:3], found[3:]):
        assert all(torch.equal(grad, first) for grad in others)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_other_precisions_pass_over_idle_experts(precision):
    """Their weights get a gradient of zeros, and nothing is quantised for them."""
    moe = tiny(precision=precision).layers[1].mlp
    x = torch.randn(1, 2, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    out, routing = moe(x)
    out.sum().backward()
    idle = routing.load_E == 0
    assert idle.any()
    assert not moe.experts.gate_up_proj.grad[idle].any()
    assert all(moe.experts.gate_up_proj.grad[~idle].flatten(1).any(1))
    empty = moe.experts(x.new_zeros(0, TINY.hidden_size), [0] * TINY.n_routed_experts)
    assert empty.shape == (0, TINY.hidden_size)


@pytest.mark.parametrize("crowd", [False, True], ids=["spread", "all to few experts"])
def test_filled_up_blocks_change_nothing_but_the_shapes(monkeypatch, crowd):
    """What bf16 does on a CPU, in fp32 and on the same tokens: outputs and gradients are those without it."""
    moe: MoE = tiny().layers[1].mlp.train()
    if crowd:
        moe.gate.e_score_correction_bias.copy_(torch.tensor([5.0] * 6 + [-5.0] * 6))
    generator = torch.Generator().manual_seed(12)
    x, aim = (torch.randn(2, 50, TINY.hidden_size, generator=generator) for _ in range(2))

    def run(block: int) -> tuple[Tensor, dict[str, Tensor], list[int]]:
        monkeypatch.setattr(RoutedExperts, "block", lambda self, rows: block)
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y, routing = moe(leaf)
        (y * aim).sum().backward()
        grads = {name: p.grad.clone() for name, p in moe.named_parameters()} | {"x": leaf.grad}
        return y, grads, moe.dispatch(x, routing).counts

    expected, expected_grads, counts = run(1)
    found, grads, rounded = run(8)
    assert rounded == [-(-count // 8) * 8 for count in counts] != counts
    assert relative(found, expected) < 1e-6
    for name, gradient in expected_grads.items():
        assert relative(grads[name], gradient) < 1e-5, name
    if crowd:
        assert not grads["experts.down_proj"][6:].any()


def test_blocks_are_a_sixteenth_of_the_mean_for_bfloat16_alone():
    experts = RoutedExperts(4, 6, 3, Precision("bf16"))
    blocks = {mean: experts.block(4 * mean) for mean in (0, 15, 16, 31, 32, 500, 512)}
    assert blocks == {0: 1, 15: 1, 16: 1, 31: 1, 32: 2, 500: 16, 512: 32}
    assert RoutedExperts(4, 6, 3, Precision()).block(4 * 512) == 1


def test_the_gradient_of_the_grouped_product_with_weights_is_right():
    experts = RoutedExperts(3, 4, 5, Precision()).double()
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    x, weights = (
        torch.randn(6, width, dtype=torch.float64, generator=generator).requires_grad_() for width in (4, 1)
    )

    def product(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, parameters, (x, [4, 0, 2], weights))

    assert torch.autograd.gradcheck(product, (x, weights, experts.gate_up_proj, experts.down_proj))
