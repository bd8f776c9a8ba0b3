"""Scores by hand, pass-key problems of the right length and depth, and a grid whose answer is known."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from data.chat import EOS, ChatTokenizer
from infra.errors import HeadwaterError
from model.engine.request import Completion, Request
from model.engine.sampling import Sampling
from post_training.evaluate import (
    PASSKEY_TOKENS,
    Score,
    passkey_cells,
    passkey_grid,
    passkey_problem,
    scores,
)
from post_training.tasks import passkey
from post_training.tasks.problem import Problem
from tests.post_training.small import reversal, rollout

# No sentence of filler is longer; at one token a character it takes as many tokens.
SENTENCE = 50


def test_scores_by_hand(tokenizer: ChatTokenizer) -> None:
    one, two = reversal("12"), Problem("sorting", "Sort 21.", "2 1\n1 2", "12")
    rollouts = [
        rollout(tokenizer, one, one.thought, one.boxed),
        rollout(tokenizer, one, "", "\\boxed{12}"),
        rollout(tokenizer, two, two.thought, "12"),
        rollout(tokenizer, one, one.thought, "\\boxed{0}"),
    ]
    lengths = [len(r.response_ids) for r in rollouts]
    assert scores(rollouts) == [
        Score("", 4, 1 / 4, 3 / 4, 3 / 4, sum(lengths) / 4),
        Score("reversal", 3, 1 / 3, 1.0, 2 / 3, (lengths[0] + lengths[1] + lengths[3]) / 3),
        Score("sorting", 1, 0.0, 0.0, 1.0, lengths[2]),
    ]


def split_at_key(prompt: str) -> tuple[str, str, str]:
    """(before, key, after) of a pass-key prompt."""
    match = re.fullmatch(r"(.*)The pass key is (\d{5})\.(.*)What is the pass key\?", prompt)
    assert match
    return match[1], match[2], match[3]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [60, 150, 400])
def test_passkey_problem_fills_its_length(tokenizer: ChatTokenizer, tokens: int, depth: float) -> None:
    rng = random.Random(f"{tokens}/{depth}")
    for _ in range(3):
        problem = passkey_problem(tokenizer, rng, tokens, depth)
        length = len(tokenizer.prompt_ids(problem.prompt))
        assert tokens - 2 * SENTENCE < length <= tokens
        before, key, after = split_at_key(problem.prompt)
        assert key == problem.answer
        if tokens == 400:
            assert length > 400 - SENTENCE
            filler = len(before) + len(after)
            assert abs(len(before) - depth * filler) <= 2 * SENTENCE
        if depth == 0.0:
            assert before == ""
        if depth == 1.0:
            assert after == " "


def test_passkey_problem_at_its_smallest(tokenizer: ChatTokenizer) -> None:
    least = len(tokenizer.prompt_ids(passkey.build(random.Random(0), 0, 0).prompt))
    problem = passkey_problem(tokenizer, random.Random(1), least, 0.5)
    assert split_at_key(problem.prompt)[::2] == ("", " ")
    with pytest.raises(HeadwaterError, match=rf"takes at least {least} tokens, {least - 1} were asked for"):
        passkey_problem(tokenizer, random.Random(1), least - 1, 0.5)


def test_cells_are_the_same_for_every_checkpoint(tokenizer: ChatTokenizer) -> None:
    cells = passkey_cells(tokenizer, [60, 90], [0.0, 1.0], repeats=3, seed=4)
    assert [(c.length, c.depth) for c in cells] == [
        (n, d) for n in (60, 90) for d in (0.0, 1.0) for _ in "abc"
    ]
    assert len({c.problem.answer for c in cells}) == 12
    assert cells == passkey_cells(tokenizer, [60, 90], [0.0, 1.0], repeats=3, seed=4)
    assert cells != passkey_cells(tokenizer, [60, 90], [0.0, 1.0], repeats=3, seed=5)


class Reader:
    """An engine that sees the last `sight` tokens of a prompt and repeats the key if it is there."""

    def __init__(self, tokenizer: ChatTokenizer, sight: int, almost: bool = False) -> None:
        self.tokenizer, self.sight, self.almost = tokenizer, sight, almost
        self.context = 10**6
        self.samplings: list[Sampling] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.samplings += {replace(r.sampling, seed=0) for r in requests}
        return [Completion([*self.tokenizer.encode(self._answer(r.prompt)), EOS]) for r in requests]

    def _answer(self, prompt: tuple[int, ...]) -> str:
        match = re.search(r"pass key is (\d{5})", self.tokenizer.decode(prompt[-self.sight :]))
        key = match[1] if match else "I do not know"
        return key[:4] if self.almost else f"The key is {key}."


def test_grid_shows_what_a_reader_can_see(tokenizer: ChatTokenizer) -> None:
    cells = passkey_cells(tokenizer, [80, 240], [0.0, 0.5, 1.0], repeats=4, seed=0)
    reader = Reader(tokenizer, sight=100)
    grid = passkey_grid(reader, tokenizer, cells)
    assert grid == {80: {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}, 240: {0.0: 0.0, 0.5: 0.0, 1.0: 1.0}}
    assert [(s.temperature, s.max_tokens) for s in reader.samplings] == [(0.0, PASSKEY_TOKENS)]


def test_a_key_with_a_digit_missing_is_not_found(tokenizer: ChatTokenizer) -> None:
    cells = passkey_cells(tokenizer, [80], [0.5], repeats=3, seed=0)
    assert passkey_grid(Reader(tokenizer, 10**6, almost=True), tokenizer, cells) == {80: {0.5: 0.0}}
