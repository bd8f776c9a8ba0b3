"""Scores of a checkpoint: pass@1 by sampling on held-out problems, and the pass-key grid over long contexts.

pass@1 at temperature 0.6 is the mean correctness over problems and samples (R1 §3). The pass-key grid asks
for a number hidden at a given depth of a context of a given length (report §4.3, figure 8).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data.chat import ChatTokenizer
from model.engine.engine import Engine
from model.engine.sampling import Sampling
from post_training.rollout import Rollout, sample
from post_training.tasks import passkey
from post_training.tasks.problem import Problem


@dataclass(frozen=True)
class Score:
    """Shares over all responses to the problems of one family (or of all, family "")."""

    family: str
    responses: int
    passed: float
    well_formed: float
    reasoned: float
    tokens: float  # mean length of a response


def scores(rollouts: Sequence[Rollout]) -> list[Score]:
    """One score a family, and first the one over all of them."""
    by_family: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_family[""].append(rollout)
        by_family[rollout.problem.family].append(rollout)
    return [_score(family, by_family[family]) for family in sorted(by_family)]


def _score(family: str, rollouts: Sequence[Rollout]) -> Score:
    n = len(rollouts)
    return Score(
        family,
        n,
        sum(r.verdict.correct for r in rollouts) / n,
        sum(r.verdict.well_formed for r in rollouts) / n,
        sum(r.verdict.reasoned for r in rollouts) / n,
        sum(len(r.response_ids) for r in rollouts) / n,
    )


def passkey_problem(tokenizer: ChatTokenizer, rng: random.Random, tokens: int, depth: float) -> Problem:
    """A pass-key problem whose prompt fills `tokens` tokens as nearly as whole sentences allow, never more.

    `depth` is the place of the key, 0 at the start and 1 just before the question.
    """
    low, high = 0, 16 * tokens
    seed = rng.randrange(2**32)
    best = passkey.build(random.Random(seed), 0, 0)
    while low <= high:
        characters = (low + high) // 2
        before = round(characters * depth)
        problem = passkey.build(random.Random(seed), before, characters - before)
        if len(tokenizer.prompt_ids(problem.prompt)) <= tokens:
            best, low = problem, characters + 1
        else:
            high = characters - 1
    return best


def passkey_grid(
    engine: Engine,
    tokenizer: ChatTokenizer,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int,
    seed: int,
) -> dict[int, dict[float, float]]:
    """Share of keys repeated exactly, by prompt length in tokens and depth (greedy).

    A key counts as found when the response contains it: the base model has not been taught the answer format.
    """
    cells: list[tuple[int, float, Problem]] = []
    for length in lengths:
        for depth in depths:
            rng = random.Random(f"{seed}/{length}/{depth}")
            cells += [(length, depth, passkey_problem(tokenizer, rng, length, depth)) for _ in range(repeats)]
    grid: dict[int, dict[float, float]] = {length: dict.fromkeys(depths, 0.0) for length in lengths}
    problems = [problem for _, _, problem in cells]
    rollouts = sample(
        engine, tokenizer, problems, [""] * len(problems), Sampling(max_tokens=24, temperature=0.0)
    )
    for (length, depth, problem), rollout in zip(cells, rollouts, strict=True):
        found = problem.answer in tokenizer.decode(rollout.response_ids)
        grid[length][depth] += found / repeats
    return grid
