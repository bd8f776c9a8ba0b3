"""Addition of two numbers, column by column from the right, as it is done on paper."""

from __future__ import annotations

import random

from post_training.tasks.problem import Family, Problem


def make(rng: random.Random, size: int) -> Problem:
    """Operands of 2 to `size` digits each."""
    a, b = (
        rng.randrange(10 ** (digits - 1), 10**digits)
        for digits in (rng.randint(2, size), rng.randint(2, size))
    )
    return Problem(
        "addition", f"What is {a}+{b}?", thought(a, b), str(a + b), twin=f"{min(a, b)}+{max(a, b)}"
    )


def thought(a: int, b: int) -> str:
    """Both numbers spelled from the right, then one line a column: digits, carry, sum."""
    columns = max(len(str(a)), len(str(b)))
    down_a, down_b = (str(n).zfill(columns)[::-1] for n in (a, b))
    lines, carry = [f"{' '.join(down_a)}", f"{' '.join(down_b)}"], 0
    for x, y in zip(down_a, down_b, strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total // 10} {total % 10}")
        carry = total // 10
    return "\n".join(lines)


FAMILY = Family("addition", make, (2, 12), "most digits of an operand")
