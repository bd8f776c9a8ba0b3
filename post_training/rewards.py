"""Rewards of rollouts: rules first, a reward model beside them when there is one (report §5.2.1, R1 eq.
8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from post_training.reward import RewardModel, score
from post_training.rollout import Rollout


def rule_rewards(rollouts: Sequence[Rollout], format_weight: float) -> Tensor:
    """1 for a correct answer, plus `format_weight` for a well-formed response: float32 [N]."""
    return torch.tensor([r.verdict.correct + format_weight * r.verdict.well_formed for r in rollouts])


def model_rewards(model: RewardModel, rollouts: Sequence[Rollout]) -> Tensor:
    """The reward model's score in (0, 1) of each whole response: float32 [N]."""
    return score(model, [r.prompt_ids + r.response_ids for r in rollouts])
