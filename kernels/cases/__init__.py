"""Every kernel in every configuration that the public functions launch: what `kernels.check` compiles."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases import (
    adamw,
    attention,
    cross_entropy,
    e5m6,
    gemm,
    grouped,
    norm,
    permute,
    quantize,
    swiglu,
    transpose,
)
from kernels.cases.case import Case

FAMILIES = (
    quantize,
    gemm,
    grouped,
    e5m6,
    permute,
    cross_entropy,
    swiglu,
    norm,
    transpose,
    attention,
    adamw,
)


def cases() -> Iterator[Case]:
    """The cases of all families."""
    for family in FAMILIES:
        yield from family.cases()
