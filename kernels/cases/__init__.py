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
    hopper,
    norm,
    permute,
    quantize,
    swiglu,
    transpose,
)
from kernels.cases.case import Case

FAMILIES = (
    quantize,
    transpose,
    gemm,
    grouped,
    hopper,
    e5m6,
    permute,
    cross_entropy,
    swiglu,
    norm,
    attention,
    adamw,
)


def cases() -> Iterator[Case]:
    """The cases of all families."""
    for family in FAMILIES:
        for case in family.cases():
            yield case
            yield from case.with_ones()
