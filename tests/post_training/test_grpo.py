"""GRPO: advantages by hand, the objective against a plain double-precision one, and a bandit that learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from data.chat import EOS, ChatTokenizer
from model.engine.engine import Engine
from model.engine.sampling import Sampling
from model.optim.build import Optimizer, OptimizerConfig
from model.transformer import Transformer
from post_training.grpo import GRPOConfig, advantages, update
from post_training.rollout import Rollout, sample
from tests.post_training.small import random_rollouts, reversal, small_model


def test_advantages_by_hand() -> None:
    # Group 1: mean 0.5, deviations +-0.5, population std 0.5. Group 2: mean 1, std sqrt(1.5).
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 0.0, 1.0, 0.0])
    root = math.sqrt(1.5)
    expected = torch.tensor([1.0, -1.0, -1.0, 1.0, 2 / root, -1 / root, 0.0, -1 / root])
    torch.testing.assert_close(advantages(rewards, 4), expected)
    assert advantages(rewards, 4).dtype == torch.float32
    # One right of eight: the sample standard deviation (ddof 1) would give 7 / sqrt(8).
    assert float(advantages(torch.tensor([1.0] + [0.0] * 7), 8)[0]) == pytest.approx(math.sqrt(7))


@pytest.mark.parametrize("value", [0.0, 1.0, 1.1, 0.1 + 0.2, 1234.567, -3e7])
def test_equal_rewards_teach_nothing(value: float) -> None:
    rewards = torch.tensor([value] * 7 + [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = advantages(rewards, 7)
    assert torch.equal(found[:7], torch.zeros(7))
    assert found[7:].abs().min() > 0.1


def test_advantages_ignore_shift_and_scale_of_a_group() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.25, 2.0])
    torch.testing.assert_close(advantages(rewards * 7 + 100, 4), advantages(rewards, 4))
    assert abs(float(advantages(rewards, 4).sum())) < 1e-6
    assert float(advantages(rewards, 4).square().mean()) == pytest.approx(1.0)


def test_a_least_spread_keeps_small_differences_small() -> None:
    noise = torch.tensor([1.001, 1.0, 1.0, 0.999])
    assert float(advantages(noise, 4).abs().max()) > 1
    assert float(advantages(noise, 4, 0.1).abs().max()) == pytest.approx(0.01, rel=1e-3)
    clear = torch.tensor([1.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(advantages(clear, 4, 0.1), advantages(clear, 4))


def test_advantages_of_broken_groups() -> None:
    with pytest.raises(ValueError, match="5 rewards do not make groups of 2"):
        advantages(torch.zeros(5), 2)


def test_config_refuses_groups_without_a_baseline() -> None:
    with pytest.raises(ValueError, match="group_size is 1"):
        GRPOConfig(group_size=1)
    with pytest.raises(ValueError, match="at least 1"):
        GRPOConfig(updates=0)


class Recorder:
    """Stands in for the optimizer: keeps each step's gradients, then moves against them by `lr`."""

    def __init__(self, model: Transformer, lr: float) -> None:
        self.model, self.lr = model, lr
        self.steps: list[dict[str, Tensor]] = []
        self.scales: list[float] = []

    def step(self, scale: float) -> float:
        named = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
        self.steps.append({n: p.grad.clone() for n, p in named.items()})
        self.scales.append(scale)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in named.values()))
        with torch.no_grad():
            for p in named.values():
                p -= self.lr * p.grad
                p.grad = None
        return norm


def log_probs(model: Transformer, rollout: Rollout) -> Tensor:
    """log p of each response token, one rollout alone, without padding: float64 [response]."""
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
    scores = torch.log_softmax(model.logits(model(tokens).states_BTD[0][0]).double(), -1)
    first = len(rollout.prompt_ids)
    return torch.stack([scores[at - 1, tokens[0, at]] for at in range(first, tokens.shape[1])])


def plain_objective(
    policy: Sequence[Tensor],
    old: Sequence[Tensor],
    reference: Sequence[Tensor],
    rewards: Sequence[float],
    config: GRPOConfig,
) -> tuple[Tensor, float, float]:
    """The objective token by token as one reads it, with its mean KL and the share of clipped ratios."""
    total, kls, clipped, count = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    for i in range(len(policy)):
        group = rewards[i - i % config.group_size :][: config.group_size]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group))
        advantage = (rewards[i] - mean) / std if std else 0.0
        for now, before, ref in zip(policy[i], old[i], reference[i], strict=True):
            ratio = torch.exp(now - before)
            inside = ratio.clamp(1 - config.clip, 1 + config.clip)
            kl = torch.exp(ref - now) - (ref - now) - 1
            total = total + torch.minimum(ratio * advantage, inside * advantage) - config.beta * kl
            kls += float(kl.detach())
            clipped += bool(ratio.detach() != inside.detach())
            count += 1
    return total / count, kls / count, clipped / count


REWARDS = [1.0, 0.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.3, 1.1, 1.1, 0.2]


@pytest.mark.parametrize(
    ("updates", "beta", "clip", "lr"),
    [(1, 0.0, 0.2, 0.1), (1, 0.3, 0.2, 0.1), (3, 0.05, 0.02, 0.1), (2, 2.0, 0.2, 0.02)],
)
def test_gradients_are_those_of_the_plain_objective(
    tokenizer: ChatTokenizer, updates: int, beta: float, clip: float, lr: float
) -> None:
    rollouts = random_rollouts(tokenizer, groups=3, size=4)
    config = GRPOConfig(groups=3, group_size=4, clip=clip, beta=beta, updates=updates, micro_tokens=64)
    model, reference = small_model(0), small_model(1)
    plain = copy.deepcopy(model)
    recorder = Recorder(model, lr)
    figures = update(model, reference, recorder, rollouts, torch.tensor(REWARDS), config)
    assert len(recorder.steps) == updates
    with torch.no_grad():
        old = [log_probs(plain, r) for r in rollouts]
        ref = [log_probs(reference, r) for r in rollouts]
    for step in range(updates):
        objective, kl, clipped = plain_objective(
            [log_probs(plain, r) for r in rollouts], old, ref, REWARDS, config
        )
        plain.zero_grad()
        (-objective).backward()
        expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert expected.keys() == recorder.steps[step].keys()
        largest = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in expected.items():
            assert float((recorder.steps[step][name] - gradient).abs().max()) < 1e-4 * largest, (step, name)
        # The next update starts from the same weights on both sides, so errors do not add up.
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if name in recorder.steps[step]:
                    p -= lr * recorder.steps[step][name]
    assert figures["objective"] == pytest.approx(float(objective.detach()), abs=1e-5)
    assert figures["kl"] == pytest.approx(kl, rel=1e-4)
    assert figures["clipped"] == pytest.approx(clipped)
    assert (clipped > 0.1) == (updates > 1)
    assert figures["grad_norm"] > 0


def test_micro_batches_change_nothing(tokenizer: ChatTokenizer) -> None:
    rollouts = random_rollouts(tokenizer, groups=3, size=4)
    found = []
    for micro_tokens in (1, 50, 100000):
        model = small_model(0)
        config = GRPOConfig(groups=3, group_size=4, beta=0.1, micro_tokens=micro_tokens)
        recorder = Recorder(model, 0.0)
        found.append(
            (update(model, small_model(1), recorder, rollouts, torch.tensor(REWARDS), config), recorder)
        )
    largest = max(float(g.abs().max()) for g in found[0][1].steps[0].values())
    for figures, recorder in found[1:]:
        assert figures["objective"] == pytest.approx(found[0][0]["objective"], abs=1e-6)
        for name, gradient in recorder.steps[0].items():
            assert float((gradient - found[0][1].steps[0][name]).abs().max()) < 1e-4 * largest, name


def test_kl_is_zero_at_the_reference_and_positive_elsewhere(tokenizer: ChatTokenizer) -> None:
    rollouts = random_rollouts(tokenizer, groups=2, size=3)
    config = GRPOConfig(groups=2, group_size=3, beta=1.0)
    equal = torch.ones(6)
    model = small_model(0)
    recorder = Recorder(model, 0.0)
    figures = update(model, copy.deepcopy(model), recorder, rollouts, equal, config)
    # No advantage and no distance: nothing to learn.
    assert figures == {"objective": 0.0, "kl": 0.0, "clipped": 0.0, "grad_norm": 0.0}
    for seed in range(1, 4):
        figures = update(model, small_model(seed), Recorder(model, 0.0), rollouts, equal, config)
        assert figures["kl"] > 0.01
        assert figures["objective"] == pytest.approx(-figures["kl"], rel=1e-5)


def test_reference_and_modes_are_left_alone(tokenizer: ChatTokenizer) -> None:
    rollouts = random_rollouts(tokenizer, groups=3, size=4)
    model, reference = small_model(0), small_model(1)
    before = {name: p.clone() for name, p in reference.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.0))
    update(model, reference, optimizer, rollouts, torch.tensor(REWARDS), GRPOConfig(3, 4, updates=2))
    assert all(torch.equal(p, before[name]) for name, p in reference.named_parameters())
    assert all(p.grad is None for p in [*reference.parameters(), *model.parameters()])
    assert not any(torch.equal(p, q) for p, q in [(model.lm_head, small_model(0).lm_head)])
    assert not model.training


def test_a_bandit_learns(tokenizer: ChatTokenizer) -> None:
    """One question, one token of answer, rewarded when its id is even: a half becomes nearly all."""
    model = small_model(0)
    reference = copy.deepcopy(model)
    optimizer = Optimizer(model, OptimizerConfig(lr=5e-3, weight_decay=0.0))
    engine = Engine(model, [EOS])
    config = GRPOConfig(groups=2, group_size=16, beta=0.001)
    shares = []
    for step in range(40):
        problems = [reversal("12"), reversal("34")]
        rollouts = sample(engine, tokenizer, problems, ["", ""], Sampling(1, 1.0, seed=step), 16)
        rewards = torch.tensor([float(r.response_ids[0] % 2 == 0) for r in rollouts])
        shares.append(float(rewards.mean()))
        update(model, reference, optimizer, rollouts, rewards, config)
    assert sum(shares[:3]) / 3 < 0.7
    assert sum(shares[-3:]) / 3 > 0.9


def test_a_strong_reference_holds_the_bandit_back(tokenizer: ChatTokenizer) -> None:
    """The KL term pulls back towards the reference: with it the policy ends nearer than without."""
    ends = []
    for beta in (0.0, 5.0):
        model = small_model(0)
        reference = copy.deepcopy(model)
        optimizer = Optimizer(model, OptimizerConfig(lr=3e-3, weight_decay=0.0))
        for step in range(8):
            rollouts = sample(
                Engine(model, [EOS]), tokenizer, [reversal("12")], [""], Sampling(1, 1.0, seed=step), 16
            )
            rewards = torch.tensor([float(r.response_ids[0] % 2 == 0) for r in rollouts])
            figures = update(model, reference, optimizer, rollouts, rewards, GRPOConfig(1, 16, beta=beta))
        ends.append(figures["kl"])
    assert ends[1] < 0.5 * ends[0]
