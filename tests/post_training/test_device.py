"""Reinforcement learning and reward models follow the device of their models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.chat import ChatTokenizer
from infra.checkpoint import Checkpoints
from model.optim.build import Optimizer, OptimizerConfig
from post_training.grpo import GRPOConfig
from post_training.reinforce import RLConfig, optimize
from post_training.reward import Pair, RewardModel, accuracy, score, train_reward
from post_training.rewards import model_rewards, rule_rewards
from post_training.tasks.problem import SYSTEM
from tests.other_device import DEVICE, other_device
from tests.post_training.small import ignore, random_rollouts, reversal, small_model


def reinforced(tokenizer: ChatTokenizer, folder: Path, device: torch.device) -> tuple[str, list[float]]:
    """A short run with a reward model and two updates a batch: where its weights are, and its rewards."""
    seen: list[float] = []
    model, judge = small_model(0).to(device), RewardModel(small_model(1)).to(device)
    torch.nn.init.normal_(judge.score_head.data, generator=torch.Generator().manual_seed(0))

    def reward(rollouts: list) -> Tensor:
        total = rule_rewards(rollouts, 0.1) + model_rewards(judge, rollouts)
        seen.extend(total.tolist())
        return total

    optimize(
        model,
        small_model(0).to(device),
        Optimizer(model, OptimizerConfig(lr=1e-4, weight_decay=0.0)),
        tokenizer,
        [reversal(str(1000 + i)) for i in range(5)],
        reward,
        GRPOConfig(groups=2, group_size=3, updates=2),
        RLConfig(steps=2, max_tokens=6),
        7,
        SYSTEM,
        Checkpoints(folder / "checkpoints"),
        folder / "rl.jsonl",
        ignore,
    )
    return model.embed_tokens.device.type, seen


def test_grpo_follows_its_model(tokenizer, tmp_path):
    _, here = reinforced(tokenizer, tmp_path / "here", torch.device("cpu"))
    with other_device() as device:
        where, there = reinforced(tokenizer, tmp_path / "there", device)
    assert where == DEVICE.type
    assert there == pytest.approx(here, rel=1e-4)


def test_a_reward_model_trains_and_scores_on_its_device(tokenizer, tmp_path):
    rollouts = random_rollouts(tokenizer, 3, 4)
    sequences = [r.prompt_ids + r.response_ids for r in rollouts]
    pairs = [Pair(a, b) for a, b in zip(sequences[::2], sequences[1::2], strict=True)]
    found = []
    for device in (torch.device("cpu"), DEVICE):
        with other_device():
            model = RewardModel(small_model(0)).to(device)
            settings = OptimizerConfig(lr=1e-3, weight_decay=0.0)
            folder = tmp_path / device.type
            train_reward(
                model, pairs, settings, 3, 4, 0, Checkpoints(folder), folder / "log.jsonl", ignore, 2
            )
            found.append([accuracy(model, pairs), *score(model, sequences).tolist()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
