"""The router against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.gate import Gate
from tests.model.tiny import TINY


def gate_of(**changes) -> Gate:
    """A gate of four experts, width 4, whose logits are the inputs themselves."""
    sizes = {
        "hidden_size": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
    }
    gate = Gate(ModelConfig(**{**TINY.to_dict(), **sizes, **changes}))
    with torch.no_grad():
        gate.weight.copy_(torch.eye(gate.config.n_routed_experts))
    return gate


def logits(*affinities: float) -> Tensor:
    """Inputs whose sigmoids are the given affinities, [1, 1, E]."""
    return torch.tensor([math.log(a / (1 - a)) for a in affinities])[None, None]


def chosen(gate: Gate, x: Tensor) -> dict[int, float]:
    """Expert -> weight of the first token."""
    routing = gate(x)
    pairs = zip(routing.experts_SK[0].tolist(), routing.weights_SK[0].tolist(), strict=True)
    return dict(sorted(pairs))


def balance(gate: Gate, *inputs: Tensor) -> float:
    """The balance loss as a number."""
    return float(gate(*inputs).balance_loss.detach())


def test_weights_are_the_normalised_affinities_of_the_chosen_times_the_factor():
    found = chosen(gate_of(), logits(0.6, 0.1, 0.2, 0.3))
    assert found == pytest.approx({0: 2.5 * 0.6 / 0.9, 3: 2.5 * 0.3 / 0.9}, rel=1e-6)


def test_the_bias_chooses_and_never_weighs():
    gate = gate_of()
    gate.e_score_correction_bias.copy_(torch.tensor([-0.5, 0.5, 0.0, 0.0]))
    # Biased 0.1, 0.6, 0.2, 0.3: experts 1 and 3, weighted by 0.1 and 0.3.
    assert chosen(gate, logits(0.6, 0.1, 0.2, 0.3)) == pytest.approx({1: 2.5 * 0.25, 3: 2.5 * 0.75}, rel=1e-6)
    x = logits(0.6, 0.1, 0.2, 0.3).requires_grad_()
    gate(x).weights_SK[0, 0].backward()
    assert not gate.e_score_correction_bias.requires_grad
    assert gate.e_score_correction_bias.grad is None
    assert x.grad.abs().sum() > 0
    assert "e_score_correction_bias" in gate.state_dict()
    assert "e_score_correction_bias" not in dict(gate.named_parameters())


def test_groups_are_ranked_by_their_two_best_biased_experts():
    gate = gate_of(hidden_size=8, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    # Sums of two: 0.90, 0.95, 0.80, 0.92. Groups 1 and 3 stay, and the best expert of all is out of reach.
    x = logits(0.85, 0.05, 0.5, 0.45, 0.4, 0.4, 0.62, 0.3)
    assert set(chosen(gate, x)) == {2, 3, 6}
    # A bias counts in the group's rank: group 2 becomes the best.
    gate.e_score_correction_bias[4] = 0.5
    assert set(chosen(gate, x)) == {2, 3, 4}


def test_only_two_of_a_group_count_and_a_negative_bias_does_not_open_a_blocked_group():
    gate = gate_of(hidden_size=6, n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2)
    # Three good experts (two best 1.2) lose against two better ones.
    assert set(chosen(gate, logits(0.6, 0.6, 0.6, 0.7, 0.7, 0.01))) == {3, 4}
    # With every biased score below zero the blocked group must stay blocked: zero is no mask.
    gate.e_score_correction_bias.copy_(torch.tensor([-2.0, -2.0, -2.0, -1.5, -1.5, -1.5]))
    assert set(chosen(gate, logits(0.6, 0.6, 0.6, 0.7, 0.7, 0.01))) == {3, 4}


def test_balance_loss_of_a_small_example_by_hand():
    """Two tokens, four experts, top 2: equations 17-20."""
    first, second = (0.6, 0.1, 0.2, 0.3), (0.5, 0.4, 0.1, 0.25)
    x = torch.cat((logits(*first), logits(*second)), dim=1)
    # f = E/(K T) * hits; expert 0 is in both top twos, 3 in the first, 1 in the second.
    f = [4 / (2 * 2) * hits for hits in (2, 1, 0, 1)]
    p = [(a / 1.2 + b / 1.25) / 2 for a, b in zip(first, second, strict=True)]
    expected = sum(a * b for a, b in zip(f, p, strict=True))
    gate = gate_of().train()
    assert balance(gate, x) == pytest.approx(expected, rel=1e-6)
    # The ranking is by unbiased affinity (equation 18), whatever the bias routes.
    gate.e_score_correction_bias.copy_(torch.tensor([-0.5, 0.0, 0.5, 0.0]))
    assert balance(gate, x) == pytest.approx(expected, rel=1e-6)
    # Averaged over sequences, not over tokens of all of them.
    other = logits(0.6, 0.1, 0.2, 0.3).expand(1, 2, 4)
    alone = [balance(gate, part) for part in (x, other)]
    assert balance(gate, torch.cat((x, other))) == pytest.approx(sum(alone) / 2, rel=1e-6)
    assert balance(gate.eval(), x) == 0.0


def test_balance_loss_is_one_at_perfect_balance_and_more_otherwise():
    gate = gate_of().train()
    even = torch.stack([torch.roll(torch.tensor([1.0, 1.0, -1.0, -1.0]), shift) for shift in range(4)])[None]
    assert balance(gate, even) == pytest.approx(1.0, rel=1e-6)
    skewed = even[:, :1].expand(1, 4, 4)
    assert balance(gate, skewed) > 1.3


def test_the_gradient_of_the_balance_loss_is_that_of_p_with_f_held_constant():
    gate = gate_of().train()
    x = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    gate(x).balance_loss.backward()
    weight = gate.weight.detach().double().requires_grad_()
    scores = (x.double() @ weight.t()).sigmoid()
    f = torch.zeros(3, 7, 4).scatter_(2, scores.detach().topk(2).indices, 1.0).double().mean(1) * 4 / 2
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)
    (f * p).sum(-1).mean().backward()
    assert torch.allclose(gate.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-9)
    assert gate.weight.grad.abs().max() > 1e-3


def test_padding_is_counted_nowhere():
    gate = gate_of().train()
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2))
    valid = torch.tensor([[True] * 4 + [False] * 2] * 2)
    assert torch.equal(gate(x, valid).load_E, gate(x[:, :4]).load_E)
    assert balance(gate, x, valid) == pytest.approx(balance(gate, x[:, :4]), rel=1e-6)
    assert int(gate(x).load_E.sum()) == 2 * 6 * 2


def test_nudge_moves_load_towards_the_mean():
    gate = gate_of()
    gate.nudge(torch.tensor([10.0, 2.0, 4.0, 0.0]), 0.001)
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.001])
    gate.nudge(torch.tensor([10.0, 2.0, 4.0, 0.0]), 0.0)
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.001])


def test_nudging_balances_a_skewed_stream():
    """Expert 0 is liked by every token; after enough steps loads are within a fifth of each other."""
    gate = gate_of().eval()
    x = torch.randn(1, 512, 4, generator=torch.Generator().manual_seed(3)) + torch.tensor([2.0, 0, 0, 0])
    before = gate(x).load_E
    for _ in range(400):
        gate.nudge(gate(x).load_E, 0.002)
    after = gate(x).load_E
    assert before.max() / before.mean() > 1.5
    assert after.max() / after.mean() < 1.2


def test_the_gate_computes_in_float32_whatever_comes_in():
    gate = gate_of()
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert gate(x).weights_SK.dtype == torch.float32
    assert torch.equal(gate(x).weights_SK, gate(x.float()).weights_SK)
