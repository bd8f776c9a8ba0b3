"""Rollouts: the same whoever else is asked, seeded by problem, judged by what was sampled."""

from __future__ import annotations

import pytest

from data.chat import EOS, ChatTokenizer
from infra.errors import HeadwaterError
from model.engine.engine import Engine
from model.engine.sampling import Sampling
from post_training.rollout import Rollout, sample
from post_training.tasks.problem import SYSTEM, Problem
from post_training.verifiers import verify
from tests.post_training.small import reversal, small_model

SAMPLING = Sampling(max_tokens=10, temperature=1.0, seed=5)
PROBLEMS = [reversal(digits) for digits in ("1234", "90210", "77", "555555", "48")]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model(), [EOS], max_rows=8)


def ask(engine: Engine, tokenizer: ChatTokenizer, problems: list[Problem], samples: int = 2) -> list[Rollout]:
    return sample(engine, tokenizer, problems, [""] * len(problems), SAMPLING, samples)


def test_alone_as_in_a_batch_in_any_order(engine: Engine, tokenizer: ChatTokenizer) -> None:
    together = ask(engine, tokenizer, PROBLEMS)
    assert [r.problem for r in together] == [p for p in PROBLEMS for _ in range(2)]
    turned = ask(engine, tokenizer, PROBLEMS[::-1])
    for i, problem in enumerate(PROBLEMS):
        mine = together[2 * i : 2 * i + 2]
        assert ask(engine, tokenizer, [problem]) == mine
        assert turned[8 - 2 * i : 10 - 2 * i] == mine
    # A larger group begins with the smaller one.
    assert ask(engine, tokenizer, PROBLEMS[:1], samples=5)[:2] == together[:2]


def test_samples_of_a_group_differ(engine: Engine, tokenizer: ChatTokenizer) -> None:
    group = ask(engine, tokenizer, PROBLEMS[:1], samples=6)
    assert len({r.response_ids for r in group}) == 6


def test_a_problem_asked_twice_gives_two_groups(engine: Engine, tokenizer: ChatTokenizer) -> None:
    twice = ask(engine, tokenizer, [PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]])
    assert len({r.response_ids for r in twice}) == 6
    # The second group goes on where the first one stopped.
    assert twice[:2] + twice[4:] == ask(engine, tokenizer, PROBLEMS[:1], samples=4)


def test_seed_and_system_prompt_change_what_is_sampled(engine: Engine, tokenizer: ChatTokenizer) -> None:
    plain = ask(engine, tokenizer, PROBLEMS[:1])
    other_seed = sample(engine, tokenizer, PROBLEMS[:1], [""], Sampling(10, 1.0, seed=6), 2)
    asked = sample(engine, tokenizer, PROBLEMS[:1], [SYSTEM], SAMPLING, 2)
    assert len({r.response_ids for r in plain + other_seed + asked}) == 6
    assert asked[0].prompt_ids == tuple(tokenizer.prompt_ids(PROBLEMS[0].prompt, SYSTEM))
    assert (plain[0].system, asked[0].system) == ("", SYSTEM)


def test_two_problems_with_one_prompt_draw_apart(engine: Engine, tokenizer: ChatTokenizer) -> None:
    twin = Problem("sorting", PROBLEMS[0].prompt, "", "1234")
    assert len({r.response_ids for r in ask(engine, tokenizer, [PROBLEMS[0], twin])}) == 4


def test_verdicts_are_about_the_sampled_tokens(engine: Engine, tokenizer: ChatTokenizer) -> None:
    for r in ask(engine, tokenizer, PROBLEMS):
        assert 1 <= len(r.response_ids) <= SAMPLING.max_tokens
        assert r.verdict == verify(tokenizer, r.response_ids, r.problem.answer)


def test_a_prompt_that_fills_the_context_is_named(tokenizer: ChatTokenizer) -> None:
    engine = Engine(small_model(), [EOS], context=20)
    with pytest.raises(
        HeadwaterError, match=r"family reversal takes \d+ tokens.*context is 20: lower the family"
    ):
        ask(engine, tokenizer, [reversal("1"), reversal("12345678901234567890")])
