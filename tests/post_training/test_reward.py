"""The reward model: learns what is separable, scores each response by itself, comes back from disk."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from data.chat import ChatTokenizer
from infra.checkpoint import Checkpoints
from model.checkpoint import CheckpointError, save_model
from model.optim.build import OptimizerConfig
from model.train import TrainingDiverged
from post_training.reward import (
    Pair,
    RewardModel,
    accuracy,
    load_reward_model,
    pair_loss,
    pairs_of,
    save_reward_model,
    score,
    train_reward,
)
from post_training.rewards import model_rewards, rule_rewards
from tests.post_training.small import (
    Stopped,
    ignore,
    random_rollouts,
    reversal,
    rollout,
    same_weights,
    small_model,
    stop_at,
)

SETTINGS = OptimizerConfig(lr=3e-3, weight_decay=0.0)


def separable(count: int, seed: int) -> list[Pair]:
    """Random sequences; the better one holds token 20 somewhere, the worse one token 21."""
    rng = random.Random(seed)

    def sequence(mark: int) -> tuple[int, ...]:
        tokens = [rng.randrange(30, 300) for _ in range(rng.randint(3, 12))]
        tokens[rng.randrange(len(tokens))] = mark
        return tuple(tokens)

    return [Pair(sequence(20), sequence(21)) for _ in range(count)]


def random_head(seed: int = 0) -> RewardModel:
    model = RewardModel(small_model(seed))
    with torch.no_grad():
        model.score_head.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def train(folder: Path, stop: int = 0, steps: int = 40, lr: float = 3e-3) -> tuple[RewardModel, int]:
    model = RewardModel(small_model())
    position = train_reward(
        model,
        separable(600, 0),
        OptimizerConfig(lr=lr, weight_decay=0.0),
        steps,
        8,
        3,
        Checkpoints(folder / "checkpoints"),
        folder / "log.jsonl",
        stop_at(stop) if stop else ignore,
        10,
    )
    return model, position.step


def test_learns_separable_pairs(tmp_path: Path) -> None:
    held = separable(50, 1)
    # A new head scores all alike, and a tie is no win.
    assert accuracy(RewardModel(small_model()), held) == 0.0
    model, _ = train(tmp_path, steps=100)
    assert accuracy(model, held) > 0.95
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2))
    assert lines[-1]["loss"] < 0.3


def test_pair_loss_by_hand() -> None:
    model = random_head()
    pairs = separable(5, 2)
    loss, ordered = pair_loss(model, pairs)
    margins = [float((model([p.better]) - model([p.worse])).detach()) for p in pairs]
    assert float(loss.detach()) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 5, rel=1e-4)
    assert ordered == pytest.approx(sum(m > 0 for m in margins) / 5)


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole, steps = train(tmp_path / "whole", steps=25)
    assert steps == 25
    for stop in (10, 14, 4):
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(Stopped):
            train(folder, stop, steps=25)
        resumed, _ = train(folder, steps=25)
        assert same_weights(whole, resumed)
        logs = [(one / "log.jsonl").read_text() for one in (tmp_path / "whole", folder)]
        assert logs[0] == logs[1]


def test_divergence_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d+: (loss|grad_norm) is (nan|inf)"):
        train(tmp_path, lr=1e25)


def test_scores_do_not_depend_on_company_or_order() -> None:
    model = random_head()
    sequences = [p.better for p in separable(20, 3)] + [p.worse for p in separable(3, 4)]
    together = score(model, sequences, batch=7)
    assert together.shape == (23,)
    assert together.min() > 0
    assert together.max() < 1
    assert together.std() > 0.05
    order = list(range(23))
    random.Random(0).shuffle(order)
    shuffled = score(model, [sequences[i] for i in order], batch=64)
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
    alone = torch.cat([score(model, [sequence]) for sequence in sequences])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_only_the_last_token_and_what_is_before_it_count() -> None:
    model = random_head()
    short, longer = (30, 31, 32), (30, 31, 32, 33, 34, 35)
    with torch.no_grad():
        padded = model([short, longer])[0]
        torch.testing.assert_close(padded, model([short])[0], atol=1e-5, rtol=0)
    states = model.trunk(torch.tensor([short])).states_BTD[0][0, -1]
    assert float(padded) == pytest.approx(float((states @ model.score_head).detach()), abs=1e-5)


def test_save_and_load(tmp_path: Path) -> None:
    model = random_head(4)
    save_reward_model(model, tmp_path)
    loaded = load_reward_model(tmp_path)
    assert same_weights(model, loaded)
    sequences = [p.better for p in separable(4, 5)]
    assert torch.equal(score(model, sequences), score(loaded, sequences))
    again = tmp_path / "again"
    save_reward_model(loaded, again)
    for path in sorted(tmp_path.glob("*.*")):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_load_of_another_checkpoint(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"no score_head\.safetensors: it is not a reward model"):
        load_reward_model(tmp_path)


def test_pairs_of_a_group(tokenizer: ChatTokenizer) -> None:
    problem = reversal("1234")
    right = [rollout(tokenizer, problem, text, problem.boxed) for text in ("a", "b", "c")]
    wrong = [rollout(tokenizer, problem, text, "\\boxed{1}") for text in ("d", "e")]
    group = [wrong[0], right[0], right[1], wrong[1], right[2]]
    prompt = tuple(tokenizer.prompt_ids(problem.prompt))
    assert pairs_of(group) == [
        Pair(prompt + right[0].response_ids, prompt + wrong[0].response_ids),
        Pair(prompt + right[1].response_ids, prompt + wrong[1].response_ids),
    ]
    assert pairs_of(right) == []
    assert pairs_of(wrong) == []


def test_rule_rewards(tokenizer: ChatTokenizer) -> None:
    problem = reversal("1234")
    rollouts = [
        rollout(tokenizer, problem, "", problem.boxed),
        rollout(tokenizer, problem, "", "\\boxed{1}"),
        rollout(tokenizer, problem, "", "4321"),
    ]
    torch.testing.assert_close(rule_rewards(rollouts, 0.1), torch.tensor([1.1, 0.1, 0.0]))
    torch.testing.assert_close(rule_rewards(rollouts, 0.0), torch.tensor([1.0, 0.0, 0.0]))


def test_model_rewards_score_prompt_and_response(tokenizer: ChatTokenizer) -> None:
    model = random_head()
    rollouts = random_rollouts(tokenizer, groups=2, size=3)
    expected = score(model, [r.prompt_ids + r.response_ids for r in rollouts])
    assert torch.equal(model_rewards(model, rollouts), expected)
    assert len(set(expected.tolist())) == 6
