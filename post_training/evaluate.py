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
from infra.errors import HeadwaterError
from model.engine.engine import Engine
from model.engine.sampling import Sampling
from post_training.rollout import Rollout, sample
from post_training.tasks import passkey
from post_training.tasks.problem import Problem

PASSKEY_TOKENS = 24
"""Longest answer to a pass-key problem; prompt and answer together fill the length that is measured."""


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

    `depth` is the place of the key, 0 at the start and 1 just before the question. Raises HeadwaterError when
    not even the bare question fits.
    """
    low, high = 0, 16 * tokens
    seed = rng.randrange(2**32)
    best = passkey.build(random.Random(seed), 0, 0)
    least = len(tokenizer.prompt_ids(best.prompt))
    if least > tokens:
        raise HeadwaterError(
            f"a pass-key problem takes at least {least} tokens, {tokens} were asked for: "
            "raise the shortest length"
        )
    while low <= high:
        characters = (low + high) // 2
        before = round(characters * depth)
        problem = passkey.build(random.Random(seed), before, characters - before)
        if len(tokenizer.prompt_ids(problem.prompt)) <= tokens:
            best, low = problem, characters + 1
        else:
            high = characters - 1
    return best


@dataclass(frozen=True)
class Cell:
    """One pass-key problem of the grid: tokens of its prompt at most, and the place of its key."""

    length: int
    depth: float
    problem: Problem


def passkey_cells(
    tokenizer: ChatTokenizer, lengths: Sequence[int], depths: Sequence[float], repeats: int, seed: int
) -> list[Cell]:
    """`repeats` problems for each length (tokens of the prompt) and depth; the same for every checkpoint."""
    cells: list[Cell] = []
    for length in lengths:
        for depth in depths:
            rng = random.Random(f"{seed}/{length}/{depth}")
            cells += [
                Cell(length, depth, passkey_problem(tokenizer, rng, length, depth)) for _ in range(repeats)
            ]
    return cells


def passkey_grid(
    engine: Engine, tokenizer: ChatTokenizer, cells: Sequence[Cell]
) -> dict[int, dict[float, float]]:
    """Share of keys repeated exactly, by prompt length in tokens and depth (greedy).

    A key counts as found when the response contains it: the base model has not been taught the answer format.
    """
    problems = [cell.problem for cell in cells]
    sampling = Sampling(PASSKEY_TOKENS, temperature=0.0)
    rollouts = sample(engine, tokenizer, problems, [""] * len(problems), sampling)
    found: dict[int, dict[float, list[bool]]] = {}
    for cell, rollout in zip(cells, rollouts, strict=True):
        answers = found.setdefault(cell.length, {}).setdefault(cell.depth, [])
        answers.append(cell.problem.answer in tokenizer.decode(rollout.response_ids))
    return {
        length: {depth: sum(answers) / len(answers) for depth, answers in row.items()}
        for length, row in found.items()
    }
