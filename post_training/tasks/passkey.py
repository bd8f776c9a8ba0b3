"""A number hidden in filler text, to be repeated: what long context is trained and measured on (report §4.3).

The problem is built to a length in characters for training; the evaluation places the key at a chosen depth.
"""

from __future__ import annotations

import random

from post_training.tasks.problem import Family, Problem

_SUBJECTS = (
    "The river",
    "A teacher",
    "The old clock",
    "My neighbour",
    "The garden",
    "A small boat",
    "The baker",
)
_VERBS = ("waits for", "looks at", "passes", "remembers", "follows", "belongs to", "listens to")
_OBJECTS = (
    "the bridge",
    "a long road",
    "the quiet town",
    "an open door",
    "the morning",
    "the market",
    "a letter",
)
QUESTION = "What is the pass key?"


def sentence(rng: random.Random) -> str:
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}."


def _filler(rng: random.Random, characters: int) -> list[str]:
    parts: list[str] = []
    while characters > 0:
        parts.append(sentence(rng))
        characters -= len(parts[-1]) + 1
    return parts


def build(rng: random.Random, before: int, after: int) -> Problem:
    """The key stands after `before` characters of filler and is followed by at least `after` more."""
    key = str(rng.randrange(10000, 100000))
    parts = [*_filler(rng, before), f"The pass key is {key}.", *_filler(rng, after)]
    return Problem("passkey", " ".join([*parts, QUESTION]), "", key)


def make(rng: random.Random, size: int) -> Problem:
    """Up to `size` characters of filler, the key anywhere in it; lengths are uniform, so short ones occur.

    One key in five stands at the very start and one in twenty at the very end: drawn uniformly they would
    almost never, and the start, next to the control tokens, is the hardest place to look for it.
    """
    total = rng.randint(0, max(0, size))
    place = rng.random()
    before = 0 if place < 0.2 else total if place < 0.25 else rng.randint(0, total)
    return build(rng, before, total - before)


FAMILY = Family("passkey", make, (0, 1_000_000), "most characters of filler")
