"""A small tokenizer, small models and hand-made rollouts for the tests of post-training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.chat import ChatTokenizer
from data.tokenizer import train
from model.config import ModelConfig
from model.transformer import Transformer, build
from post_training.rollout import Rollout
from post_training.tasks.problem import SYSTEM, Problem
from post_training.tasks.registry import FAMILIES
from post_training.verifiers import verify

SMALL = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=48,
    moe_intermediate_size=20,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=1.0,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    num_nextn_predict_layers=1,
    initializer_range=0.1,
    original_max_position_embeddings=96,
)


def write_tokenizer(path: Path) -> ChatTokenizer:
    """Train on problems of every family, every digit a token of its own, and open it."""
    rng = random.Random(0)
    texts = [SYSTEM] * 20
    for family in FAMILIES.values():
        for _ in range(40):
            problem = family.make(rng, max(4, family.sizes[0]))
            texts += [problem.prompt, problem.thought, problem.boxed]
    path.write_text(train(texts, SMALL.vocab_size, max_digits=1), encoding="utf-8")
    return ChatTokenizer(path)


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    """A model with random weights; `changes` are fields of its configuration."""
    return build(ModelConfig(**{**SMALL.to_dict(), **changes}), seed).eval()


def reversal(digits: str) -> Problem:
    """The problem of the reversal family for these digits."""
    thought = f"{' '.join(digits)}\n{' '.join(reversed(digits))}"
    return Problem("reversal", f"Reverse {digits}.", thought, digits[::-1])


def rollout(
    tokenizer: ChatTokenizer, problem: Problem, thought: str, answer: str, system: str = ""
) -> Rollout:
    """A rollout that says `thought` and `answer`, judged as a sampled one is."""
    tokens = tuple(tokenizer.response_ids(thought, answer))
    verdict = verify(tokenizer, tokens, problem.answer)
    return Rollout(problem, system, tuple(tokenizer.prompt_ids(problem.prompt, system)), tokens, verdict)


def random_rollouts(tokenizer: ChatTokenizer, groups: int, size: int, seed: int = 0) -> list[Rollout]:
    """Groups of rollouts with random tokens of random lengths, for what does not look at their meaning."""
    rng = random.Random(seed)
    made = []
    for _ in range(groups):
        problem = reversal(str(rng.randrange(1000, 10000)))
        prompt = tuple(tokenizer.prompt_ids(problem.prompt))
        for _ in range(size):
            tokens = tuple(rng.randrange(10, SMALL.vocab_size) for _ in range(rng.randint(1, 12)))
            made.append(Rollout(problem, "", prompt, tokens, verify(tokenizer, tokens, problem.answer)))
    return made


class Stopped(Exception):
    """Raised by a progress callback, in place of a killed process."""


def stop_at(step: int) -> Callable[[Any, dict[str, float]], None]:
    """A progress callback that ends the run at a step."""

    def progress(position: Any, figures: dict[str, float]) -> None:
        if position.step == step:
            raise Stopped

    return progress


def ignore(position: Any, figures: dict[str, float]) -> None:
    """A progress callback that does nothing."""


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether all parameters and buffers are bit-equal."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
