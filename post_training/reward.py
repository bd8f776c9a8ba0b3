"""The reward model: a scalar read at the end of a response, trained on pairs (report §5.2.1).

It starts from the SFT checkpoint. The preferred and the rejected response of a pair answer the same prompt,
and the whole response is scored, reasoning included. The loss is Bradley and Terry's, -log sigmoid(better -
worse); the report does not publish its own.
Legend: B responses, T positions, D hidden.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data.chat import PAD
from model.checkpoint import CheckpointError, load_model, save_model
from model.optim.build import Optimizer, OptimizerConfig
from model.schedule import cosine
from model.train import CheckpointStore, Position, resume
from model.transformer import Transformer
from post_training.rollout import Rollout
from post_training.steps import Progress, finish_step


@dataclass(frozen=True)
class Pair:
    """Token ids of two responses to one prompt, prompt included."""

    better: tuple[int, ...]
    worse: tuple[int, ...]


class RewardModel(nn.Module):
    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        self.trunk = trunk
        self.score_head = nn.Parameter(trunk.embed_tokens.new_zeros(trunk.config.hidden_size))

    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Score of each sequence at its last token: float32 [B]."""
        device = self.trunk.embed_tokens.device
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        longest = max(len(sequence) for sequence in sequences)
        tokens_BT = torch.stack(
            [F.pad(torch.tensor(sequence), (0, longest - len(sequence)), value=PAD) for sequence in sequences]
        ).to(device)
        states_BTD = self.trunk(tokens_BT).states_BTD[0]
        return states_BTD[torch.arange(len(sequences), device=device), lengths - 1].float() @ self.score_head


def pair_loss(model: RewardModel, pairs: Sequence[Pair]) -> tuple[Tensor, float]:
    """Mean -log sigmoid(better - worse), and the share of pairs that are ordered rightly."""
    scores = model([p.better for p in pairs] + [p.worse for p in pairs])
    margin = scores[: len(pairs)] - scores[len(pairs) :]
    return -F.logsigmoid(margin).mean(), float((margin > 0).float().mean())


def pairs_of(group: Sequence[Rollout]) -> list[Pair]:
    """Right against wrong responses of one problem, each used at most once, in the order sampled."""
    right = [r for r in group if r.verdict.correct]
    wrong = [r for r in group if not r.verdict.correct]
    return [
        Pair(a.prompt_ids + a.response_ids, b.prompt_ids + b.response_ids)
        for a, b in zip(right, wrong, strict=False)
    ]


@torch.no_grad()
def accuracy(model: RewardModel, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose better response scores higher."""
    better = score(model, [p.better for p in pairs])
    worse = score(model, [p.worse for p in pairs])
    return float((better > worse).float().mean())


def train_reward(
    model: RewardModel,
    pairs: Sequence[Pair],
    settings: OptimizerConfig,
    steps: int,
    batch_pairs: int,
    seed: int,
    checkpoints: CheckpointStore,
    log_file: Path,
    progress: Progress,
    checkpoint_every: int,
) -> Position:
    """Minimise the pair loss; a step's pairs are a function of seed and step.

    Resumes from its last checkpoint. Raises TrainingDiverged when loss or gradient norm is not finite.
    """
    optimizer = Optimizer(model, settings)
    position = resume(model, optimizer, checkpoints, log_file)
    model.train()
    with log_file.open("a") as log:
        while position.step < steps:
            rng = random.Random(f"{seed}/{position.step}")
            batch = [rng.choice(pairs) for _ in range(batch_pairs)]
            loss, right = pair_loss(model, batch)
            loss.backward()
            norm = optimizer.step(cosine(position.step, steps, min(5, steps), 0.1))
            tokens = sum(len(pair.better) + len(pair.worse) for pair in batch)
            position.step += 1
            position.rows += 2 * len(batch)
            position.tokens += tokens
            figures = {"loss": float(loss.detach()), "ordered": right, "grad_norm": norm}
            finish_step(
                position,
                figures,
                {name: figures[name] for name in ("loss", "grad_norm")},
                model,
                optimizer,
                checkpoints,
                position.step % checkpoint_every == 0 or position.step == steps,
                log,
                progress,
            )
    return position


@torch.no_grad()
def score(model: RewardModel, sequences: Sequence[Sequence[int]], batch: int = 64) -> Tensor:
    """Probability-like scores in (0, 1), sigmoid of the raw ones, in the order given: float32 [B], on the
    CPU."""
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        scores[torch.tensor(part)] = model([sequences[i] for i in part]).sigmoid().cpu()
    return scores


def save_reward_model(model: RewardModel, folder: Path) -> None:
    """The trunk as any checkpoint, and the head beside it."""
    save_model(model.trunk, folder)
    save_file({"score_head": model.score_head.detach()}, folder / "score_head.safetensors")


def load_reward_model(folder: Path, device: torch.device | str = "cpu") -> RewardModel:
    """Raises CheckpointError when the folder holds a model without a score head."""
    path = folder / "score_head.safetensors"
    if not path.exists():
        raise CheckpointError(f"{folder} has no score_head.safetensors: it is not a reward model")
    model = RewardModel(load_model(folder, device=device))
    model.score_head.data.copy_(load_file(path)["score_head"])
    return model
