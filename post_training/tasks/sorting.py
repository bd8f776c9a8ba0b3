"""Sorting of the digits of a string: spelled out, then drawn smallest first."""

from __future__ import annotations

import random

from post_training.tasks.problem import Family, Problem


def make(rng: random.Random, size: int) -> Problem:
    """Strings of 4 to `size` digits, or of `size` when that is less."""
    digits = "".join(str(rng.randrange(10)) for _ in range(rng.randint(min(4, size), size)))
    ordered = sorted(digits)
    thought = f"{' '.join(digits)}\n{' '.join(ordered)}"
    return Problem("sorting", f"Sort {digits}.", thought, "".join(ordered))


FAMILY = Family("sorting", make, (2, 24), "most digits of the string")
