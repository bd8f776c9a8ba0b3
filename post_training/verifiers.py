"""Rule-based verification of a response: the reward that cannot be argued with (report §5.2.1, R1 §2.2.2).

A response is read from its token ids, so that a control token spelled in letters deceives nobody. The
answer must stand alone in exactly one box after the reasoning: what a model mentions on the way never
counts as its answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.chat import EOS, ChatTokenizer

_BOXED = re.compile(r"\s*\\boxed\{([^{}]*)\}\s*")


@dataclass(frozen=True)
class Verdict:
    """`correct` implies `well_formed`. `reason` says what is wrong, "" when nothing is."""

    correct: bool
    well_formed: bool
    reasoned: bool
    answer: str
    reason: str


def verify(tokenizer: ChatTokenizer, tokens: Sequence[int], expected: str) -> Verdict:
    """Judge a completion (ids after the prompt, stop token included) against the expected answer.

    Well formed: the response ended by itself, holds at most one thought, closed and in front, and nothing
    after it but one box. Correct: the box holds the expected answer exactly, surrounding spaces aside.
    """
    response = tokenizer.parse_response(tokens)
    if not response.well_formed or list(tokens).index(EOS) != len(tokens) - 1:
        return Verdict(
            False, False, False, "", "the response is cut off or holds control tokens out of place"
        )
    if response.thinking and not response.thought.strip():
        return Verdict(False, False, False, "", "the thought is empty")
    match = _BOXED.fullmatch(response.answer)
    if match is None:
        return Verdict(False, False, response.thinking, "", "the answer is not exactly one \\boxed{...}")
    answer = match[1].strip()
    wrong = "" if answer == expected else f"the box holds {answer!r}, not {expected!r}"
    return Verdict(not wrong, True, response.thinking, answer, wrong)
