"""Rejection sampling: right, of its form, shortest first, no text twice."""

from __future__ import annotations

from data.chat import ChatTokenizer
from post_training.rejection import Form, keep
from tests.post_training.small import reversal, rollout

CONCISE = Form("concise", "", reasons=False)
REASONED = Form("reasoned", "think", reasons=True)
PROBLEM = reversal("1234")
OTHER = reversal("56")


def test_shortest_correct_is_kept(tokenizer: ChatTokenizer) -> None:
    long = rollout(tokenizer, PROBLEM, "1 2 3 4\n4 3 2 1\nyes", PROBLEM.boxed)
    short = rollout(tokenizer, PROBLEM, "4 3 2 1", PROBLEM.boxed)
    wrong = rollout(tokenizer, PROBLEM, "", "\\boxed{1}")
    bare = rollout(tokenizer, PROBLEM, "", "4321")
    assert keep([long, wrong, short, bare], REASONED, samples=4, most=1) == [short]
    assert keep([long, wrong, short, bare], REASONED, samples=4, most=2) == [short, long]
    assert keep([long, wrong, short, bare], REASONED, samples=4, most=9) == [short, long]


def test_each_form_takes_its_own_answers_alone(tokenizer: ChatTokenizer) -> None:
    direct = rollout(tokenizer, PROBLEM, "", PROBLEM.boxed)
    thought = rollout(tokenizer, PROBLEM, PROBLEM.thought, PROBLEM.boxed)
    assert keep([thought, direct], CONCISE, samples=2, most=1) == [direct]
    assert keep([thought, direct], REASONED, samples=2, most=1) == [thought]
    assert keep([direct, direct], REASONED, samples=2, most=1) == []
    assert keep([thought, thought], CONCISE, samples=2, most=1) == []


def test_same_text_counts_once(tokenizer: ChatTokenizer) -> None:
    one = rollout(tokenizer, PROBLEM, "a", PROBLEM.boxed)
    assert keep([one, one, one], REASONED, samples=3, most=3) == [one]


def test_ties_go_by_tokens_not_by_order(tokenizer: ChatTokenizer) -> None:
    tied = [rollout(tokenizer, PROBLEM, text, PROBLEM.boxed) for text in ("3", "1", "2")]
    assert len({len(r.response_ids) for r in tied}) == 1
    first = min(tied, key=lambda r: r.response_ids)
    for turned in (tied, tied[::-1], tied[1:] + tied[:1]):
        assert keep(turned, REASONED, samples=3, most=1) == [first]


def test_groups_do_not_mix(tokenizer: ChatTokenizer) -> None:
    right = rollout(tokenizer, PROBLEM, "", PROBLEM.boxed)
    wrong = rollout(tokenizer, OTHER, "", "\\boxed{56}")
    other = rollout(tokenizer, OTHER, "", OTHER.boxed)
    assert keep([right, right, wrong, wrong], CONCISE, samples=2, most=1) == [right]
    assert keep([right, right, wrong, other], CONCISE, samples=2, most=1) == [right, other]
    assert keep([], CONCISE, samples=2, most=1) == []
