"""Reversal of a string of digits: spelled out, then read backwards."""

from __future__ import annotations

import random

from post_training.tasks.problem import Family, Problem


def make(rng: random.Random, size: int) -> Problem:
    """Strings of 4 to `size` digits, or of `size` when that is less."""
    digits = "".join(str(rng.randrange(10)) for _ in range(rng.randint(min(4, size), size)))
    thought = f"{' '.join(digits)}\n{' '.join(reversed(digits))}"
    return Problem("reversal", f"Reverse {digits}.", thought, digits[::-1])


FAMILY = Family("reversal", make, (2, 24), "most digits of the string")
