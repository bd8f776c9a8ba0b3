"""A problem with a known answer, and what every family of problems offers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

SYSTEM = "Think step by step, then answer in a box."
"""The system prompt that asks for reasoning (report §5.1: one of the two forms of each fine-tuning
sample)."""


@dataclass(frozen=True)
class Problem:
    """`thought` is a worked solution, `answer` the bare answer that the verifier expects.

    `twin` is what problems that ask the same in other words have in common (a+b and b+a); they are held out
    together. Empty when there are none.
    """

    family: str
    prompt: str
    thought: str
    answer: str
    twin: str = ""

    @property
    def id(self) -> str:
        """16 hex digits over family and prompt: the same question is the same problem wherever it is made."""
        return hashlib.sha256(f"{self.family}\0{self.prompt}".encode()).hexdigest()[:16]

    @property
    def boxed(self) -> str:
        """The answer as it ends a response."""
        return boxed(self.answer)


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


@dataclass(frozen=True)
class Family:
    """A kind of problem. `make(rng, size)` draws one; `size` means what `size_help` says."""

    name: str
    make: Callable[[random.Random, int], Problem]
    sizes: tuple[int, int]
    size_help: str


def is_held_out(problem: Problem, share: float, salt: str = "split") -> bool:
    """Split by hash of the problem, before anything is trained: no stage can see a held-out question, nor
    its twin.

    Another `salt` gives an independent split, for a stage that measures itself on training problems.
    """
    key = f"{problem.family}/{problem.twin}" if problem.twin else problem.id
    return int(hashlib.sha256(f"{salt}\0{key}".encode()).hexdigest()[:8], 16) < share * 2**32
