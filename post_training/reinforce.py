"""The reinforcement-learning loop: sample groups, reward, update, checkpoint; bit-exact when resumed.

Which problems a step asks, and every random number of its sampling, are functions of the seed and the step,
so the whole state of a run is weights, optimizer and step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.chat import EOS, ChatTokenizer
from infra.errors import HeadwaterError
from model.engine.engine import Engine
from model.engine.sampling import Sampling
from model.optim.build import Optimizer
from model.train import CheckpointStore, Position, resume
from model.transformer import Transformer
from post_training.grpo import GRPOConfig, update
from post_training.rollout import Rollout, sample
from post_training.steps import Progress, finish_step
from post_training.tasks.problem import Problem

Reward = Callable[[Sequence[Rollout]], Tensor]
"""Rollouts to float32 rewards [N]; called once a step with all groups."""


@dataclass(frozen=True)
class RLConfig:
    steps: int = 90
    """Batches of rollouts."""
    temperature: float = 1.0
    """Of sampling; the objective scores at 1, so another value is off-policy."""
    max_tokens: int = 128
    """Longest response."""
    system_share: float = 0.0
    """Share of groups asked with the system prompt; without it the policy must learn to reason unasked."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""


def optimize(
    model: Transformer,
    reference: Transformer,
    optimizer: Optimizer,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    grpo: GRPOConfig,
    config: RLConfig,
    seed: int,
    system: str,
    checkpoints: CheckpointStore,
    log_file: Path,
    progress: Progress,
) -> Position:
    """Run `config.steps` steps, or what is left of them after the last checkpoint.

    `position.tokens` counts the tokens of prompts and responses. `reference` stays as it is. Raises
    HeadwaterError without problems, TrainingDiverged when reward, objective or gradient norm is
    not finite.
    """
    if not problems:
        raise HeadwaterError("reinforcement learning needs at least one problem with a known answer")
    position = resume(model, optimizer, checkpoints, log_file)
    engine = Engine(model, [EOS], max_rows=grpo.groups * grpo.group_size)
    families = sorted({problem.family for problem in problems})
    pools = [[p for p in problems if p.family == family] for family in families]
    with log_file.open("a") as log:
        while position.step < config.steps:
            started = time.perf_counter()
            rng = random.Random(f"{seed}/{position.step}")
            # Families in equal shares: a large pool must not drown a small one.
            asked = [rng.choice(rng.choice(pools)) for _ in range(grpo.groups)]
            systems = [system if rng.random() < config.system_share else "" for _ in asked]
            sampling = Sampling(config.max_tokens, config.temperature, seed=seed * 1_000_003 + position.step)
            rollouts = sample(engine, tokenizer, asked, systems, sampling, grpo.group_size)
            rewards = reward(rollouts)
            sampled = time.perf_counter()
            figures = update(model, reference, optimizer, rollouts, rewards, grpo)
            n = len(rollouts)
            responses = sum(len(r.response_ids) for r in rollouts)
            tokens = responses + sum(len(r.prompt_ids) for r in rollouts)
            figures |= {
                "reward": float(rewards.mean()),
                "correct": sum(r.verdict.correct for r in rollouts) / n,
                "well_formed": sum(r.verdict.well_formed for r in rollouts) / n,
                "reasoned": sum(r.verdict.reasoned for r in rollouts) / n,
                "response_tokens": responses / n,
                "rollout_seconds": sampled - started,
                "update_seconds": time.perf_counter() - sampled,
            }
            position.step += 1
            position.rows += n
            position.tokens += tokens
            figures["tokens_per_second"] = responses / (time.perf_counter() - started)
            finish_step(
                position,
                figures,
                {name: figures[name] for name in ("reward", "objective", "grad_norm")},
                model,
                optimizer,
                checkpoints,
                position.step % config.checkpoint_every == 0 or position.step == config.steps,
                log,
                progress,
            )
    return position
