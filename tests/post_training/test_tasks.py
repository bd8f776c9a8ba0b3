"""Problem families: answers recomputed from the question, worked solutions checked line by line."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.tasks import addition, passkey
from post_training.tasks.problem import Problem, is_held_out
from post_training.tasks.registry import FAMILIES


def many(family: str, size: int, count: int = 300) -> list[Problem]:
    rng = random.Random(f"{family}/{size}")
    return [FAMILIES[family].make(rng, size) for _ in range(count)]


def test_registry_knows_each_family_by_its_own_name() -> None:
    assert {"addition", "reversal", "sorting", "passkey"} <= set(FAMILIES)
    assert all(name == family.name for name, family in FAMILIES.items())
    assert all(problem.family == name for name in FAMILIES for problem in many(name, 4, 5))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_same_generator_same_problems(name: str) -> None:
    one, two = (
        [FAMILIES[name].make(random.Random(7), FAMILIES[name].sizes[0] + 2) for _ in range(3)] for _ in "ab"
    )
    assert one == two


@pytest.mark.parametrize("size", [2, 4, 12])
def test_addition(size: int) -> None:
    seen = set()
    for problem in many("addition", size):
        match = re.fullmatch(r"What is (\d+)\+(\d+)\?", problem.prompt)
        assert match
        a, b = match.groups()
        assert int(problem.answer) == int(a) + int(b)
        assert str(int(problem.answer)) == problem.answer
        seen |= {len(a), len(b)}
        check_column_addition(problem.thought, a, b, problem.answer)
    assert seen == set(range(2, size + 1))


def check_column_addition(thought: str, a: str, b: str, answer: str) -> None:
    """Read the thought as a person would: digits from the right, then a carry that is handed on."""
    first, second, *columns = thought.split("\n")
    width = max(len(a), len(b))
    assert first.split(" ") == list(reversed("0" * (width - len(a)) + a))
    assert second.split(" ") == list(reversed("0" * (width - len(b)) + b))
    assert len(columns) == width
    carry, digits = "0", ""
    for column, x, y in zip(columns, first.split(" "), second.split(" "), strict=True):
        match = re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d) (\d)", column)
        assert match, column
        assert (match[1], match[2], match[3]) == (x, y, carry)
        assert int(match[1]) + int(match[2]) + int(match[3]) == 10 * int(match[4]) + int(match[5])
        carry, digits = match[4], match[5] + digits
    assert (carry + digits if carry != "0" else digits) == answer


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_addition_thought_is_right_for_any_two_numbers(a: int, b: int) -> None:
    check_column_addition(addition.thought(a, b), str(a), str(b), str(a + b))


@pytest.mark.parametrize("size", [2, 4, 9])
def test_reversal(size: int) -> None:
    for problem in many("reversal", size):
        match = re.fullmatch(r"Reverse (\d+)\.", problem.prompt)
        assert match
        digits = match[1]
        assert min(4, size) <= len(digits) <= size
        backwards = "".join(digits[len(digits) - 1 - i] for i in range(len(digits)))
        assert problem.answer == backwards
        spelled, turned = problem.thought.split("\n")
        assert (spelled.split(" "), turned.split(" ")) == (list(digits), list(backwards))


@pytest.mark.parametrize("size", [2, 4, 9])
def test_sorting(size: int) -> None:
    for problem in many("sorting", size):
        match = re.fullmatch(r"Sort (\d+)\.", problem.prompt)
        assert match
        digits = match[1]
        assert min(4, size) <= len(digits) <= size
        # Counted, not sorted: another way to the same answer.
        counted = "".join(str(d) * digits.count(str(d)) for d in range(10))
        assert problem.answer == counted
        spelled, ordered = problem.thought.split("\n")
        assert (spelled.split(" "), ordered.split(" ")) == (list(digits), list(counted))


@pytest.mark.parametrize("size", [0, 60, 400])
def test_passkey(size: int) -> None:
    for problem in many("passkey", size, 100):
        assert problem.thought == ""
        keys = re.findall(r"The pass key is (\d+)\.", problem.prompt)
        assert keys == [problem.answer]
        assert 10000 <= int(problem.answer) <= 99999
        assert problem.prompt.endswith(f" {passkey.QUESTION}")
        # Filler on either side runs to the end of a sentence, some 45 characters at most.
        assert len(problem.prompt) <= size + 2 * 45 + len(f"The pass key is 12345. {passkey.QUESTION}")


def test_passkey_build_places_the_key() -> None:
    for before, after in [(0, 0), (0, 300), (300, 0), (120, 180)]:
        prompt = passkey.build(random.Random(3), before, after).prompt
        at = prompt.index("The pass key is")
        end = prompt.index(passkey.QUESTION)
        assert before <= at <= before + 45
        assert after <= end - at - len("The pass key is 12345. ") <= after + 45


def test_id_depends_on_family_and_question_alone() -> None:
    base = Problem("sorting", "Sort 21.", "2 1\n1 2", "12")
    assert base.id == Problem("sorting", "Sort 21.", "", "anything").id
    assert base.id != Problem("reversal", "Sort 21.", "2 1\n1 2", "12").id
    assert base.id != Problem("sorting", "Sort 12.", "2 1\n1 2", "12").id
    assert re.fullmatch(r"[0-9a-f]{16}", base.id)
    # Where family ends and question begins is part of the identity.
    assert Problem("a", "b c", "", "").id != Problem("a b", "c", "", "").id


def test_boxed() -> None:
    assert Problem("f", "p", "", "12").boxed == "\\boxed{12}"


def test_held_out_share_and_salt() -> None:
    problems = [Problem("f", str(i), "", "") for i in range(4000)]
    held = [p for p in problems if is_held_out(p, 0.1)]
    assert 300 < len(held) < 500
    # A larger share holds out more of the same, never others.
    assert set(held) <= {p for p in problems if is_held_out(p, 0.3)}
    salted = [p for p in held if is_held_out(p, 0.1, "other")]
    assert 10 < len(salted) < 90
    assert not any(is_held_out(p, 0.0) for p in problems)


def test_additions_that_differ_in_the_order_of_their_operands_are_held_out_together() -> None:
    rng = random.Random(3)
    for _ in range(200):
        problem = addition.make(rng, 3)
        a, b = problem.prompt.removeprefix("What is ").removesuffix("?").split("+")
        mirror = Problem("addition", f"What is {b}+{a}?", "", problem.answer, twin=problem.twin)
        assert problem.twin == "+".join(sorted((a, b), key=int))
        assert is_held_out(problem, 0.3) == is_held_out(mirror, 0.3)
