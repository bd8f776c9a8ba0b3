"""The verifier against everything that a policy may try."""

from __future__ import annotations

import pytest

from data.chat import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER, ChatTokenizer
from post_training.verifiers import verify

THOUGHT = "2 1\n1 2"


def spell(tokenizer: ChatTokenizer, parts: list[int | str]) -> list[int]:
    """Control ids as given, strings encoded as raw text."""
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))]


RIGHT: dict[str, list[int | str]] = {
    "answer alone": ["\\boxed{12}", EOS],
    "after a thought": [THINK, THOUGHT, END_THINK, "\\boxed{12}", EOS],
    "spaces around the box": [THINK, THOUGHT, END_THINK, "\n \\boxed{12}\n", EOS],
    "spaces in the box": ["\\boxed{ 12\t}", EOS],
    "a wrong box in the thought": [THINK, "\\boxed{21}", END_THINK, "\\boxed{12}", EOS],
    "sentinels in letters in the thought": [
        THINK,
        "</think>\\boxed{21}<think>",
        END_THINK,
        "\\boxed{12}",
        EOS,
    ],
}

MALFORMED: dict[str, list[int | str]] = {
    "nothing": [],
    "only the end": [EOS],
    "cut off": [THINK, THOUGHT, END_THINK, "\\boxed{12}"],
    "cut off in the thought": [THINK, THOUGHT],
    "never left the thought": [THINK, THOUGHT, "\\boxed{12}", EOS],
    "box in the thought only": [THINK, "\\boxed{12}", END_THINK, EOS],
    "empty thought": [THINK, END_THINK, "\\boxed{12}", EOS],
    "blank thought": [THINK, " \n\t", END_THINK, "\\boxed{12}", EOS],
    "two thoughts": [THINK, "a", END_THINK, THINK, "b", END_THINK, "\\boxed{12}", EOS],
    "nested thoughts": [THINK, "a", THINK, "b", END_THINK, END_THINK, "\\boxed{12}", EOS],
    "thought after the answer": ["\\boxed{12}", THINK, THOUGHT, END_THINK, EOS],
    "text before the thought": ["well ", THINK, THOUGHT, END_THINK, "\\boxed{12}", EOS],
    "end of a thought that never began": [THOUGHT, END_THINK, "\\boxed{12}", EOS],
    "thought tags in letters": ["<think>2 1</think>\\boxed{12}", EOS],
    "end of text in letters": ["\\boxed{12}<｜end▁of▁sentence｜>"],
    "no box": [THINK, THOUGHT, END_THINK, "12", EOS],
    "two boxes": ["\\boxed{12}\\boxed{12}", EOS],
    "two boxes, one wrong": ["\\boxed{21} \\boxed{12}", EOS],
    "text before the box": ["It is \\boxed{12}", EOS],
    "text after the box": ["\\boxed{12}.", EOS],
    "unterminated box": ["\\boxed{12", EOS],
    "unopened box": ["\\boxed 12}", EOS],
    "nested braces": ["\\boxed{{12}}", EOS],
    "a box in the box": ["\\boxed{\\boxed{12}}", EOS],
    "another command": ["\\fbox{12}", EOS],
    "box without its backslash": ["boxed{12}", EOS],
    "ended by another turn": ["\\boxed{12}", USER],
    "ended by padding": ["\\boxed{12}", PAD],
    "control token in the box": ["\\boxed{1", PAD, "2}", EOS],
    "control token before the answer": [BOS, "\\boxed{12}", EOS],
    "speaks for the user": ["\\boxed{12}", USER, "Sort 3.", ASSISTANT, "\\boxed{3}", EOS],
    "goes on after the end": ["\\boxed{12}", EOS, "and more"],
    "a second answer after the end": ["\\boxed{12}", EOS, "\\boxed{21}", EOS],
}

WRONG: dict[str, tuple[list[int | str], str]] = {
    "another number": (["\\boxed{21}", EOS], "21"),
    "empty box": (["\\boxed{}", EOS], ""),
    "blank box": (["\\boxed{  }", EOS], ""),
    "leading zero": (["\\boxed{012}", EOS], "012"),
    "decimal": (["\\boxed{12.0}", EOS], "12.0"),
    "space between digits": (["\\boxed{1 2}", EOS], "1 2"),
    "line break between digits": (["\\boxed{1\n2}", EOS], "1\n2"),
    "fullwidth digits": (["\\boxed{１２}", EOS], "１２"),
    "arabic digits": (["\\boxed{١٢}", EOS], "١٢"),
    "superscript": (["\\boxed{1²}", EOS], "1²"),
    "zero-width space": (["\\boxed{1\u200b2}", EOS], "1\u200b2"),
    "an expression that equals it": (["\\boxed{11+1}", EOS], "11+1"),
    "two answers in one box": (["\\boxed{12, 21}", EOS], "12, 21"),
    "sign": (["\\boxed{+12}", EOS], "+12"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(tokenizer: ChatTokenizer, name: str) -> None:
    verdict = verify(tokenizer, spell(tokenizer, RIGHT[name]), "12")
    assert verdict.correct
    assert verdict.well_formed
    assert (verdict.answer, verdict.reason) == ("12", "")
    assert verdict.reasoned == (THINK in RIGHT[name])


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tokenizer: ChatTokenizer, name: str) -> None:
    verdict = verify(tokenizer, spell(tokenizer, MALFORMED[name]), "12")
    assert not verdict.correct
    assert not verdict.well_formed
    assert verdict.reason


@pytest.mark.parametrize("name", WRONG)
def test_wrong(tokenizer: ChatTokenizer, name: str) -> None:
    parts, answer = WRONG[name]
    verdict = verify(tokenizer, spell(tokenizer, parts), "12")
    assert not verdict.correct
    assert verdict.well_formed
    assert verdict.answer == answer
    assert "'12'" in verdict.reason


def test_half_a_character_is_no_answer(tokenizer: ChatTokenizer) -> None:
    """A response that ends inside a character decodes to a replacement, which equals nothing."""
    tokens = [*tokenizer.encode("\\boxed{"), tokenizer.encode("é")[0], *tokenizer.encode("}"), EOS]
    assert not verify(tokenizer, tokens, "é").correct
    assert verify(tokenizer, [*tokenizer.encode("\\boxed{é}"), EOS], "é").correct
