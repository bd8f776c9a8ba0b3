"""Every kernel of this folder as data: what `python -m kernels.bench` checks and times, a file a family."""

from __future__ import annotations

from kernels.bench import (
    adamw,
    attention,
    cross_entropy,
    decode,
    e5m6,
    gemm,
    grouped,
    grouped_quantize,
    linear,
    mlp,
    norm,
    permute,
    quantize,
    swiglu,
    transpose,
)
from kernels.bench.entry import Entry

FAMILIES = {
    "quantize": quantize,
    "transpose": transpose,
    "grouped_quantize": grouped_quantize,
    "gemm": gemm,
    "grouped": grouped,
    "linear": linear,
    "mlp": mlp,
    "swiglu": swiglu,
    "norm": norm,
    "permute": permute,
    "e5m6": e5m6,
    "attention": attention,
    "decode": decode,
    "adamw": adamw,
    "cross_entropy": cross_entropy,
}


def entries(only: str | None = None) -> list[Entry]:
    """All entries, or those of the family or the function called `only`.

    Raises:
        ValueError: there is no such family or function.
    """
    found = [
        entry
        for family, module in FAMILIES.items()
        for entry in module.ENTRIES
        if only is None or only in (family, entry.name)
    ]
    if not found:
        names = sorted({*FAMILIES, *(entry.name for entry in entries())})
        raise ValueError(f"kernels.bench: there is no {only!r}; choose one of {', '.join(names)}")
    return found
