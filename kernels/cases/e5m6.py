"""The kernels of e5m6.py."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases.case import Case
from kernels.formats import e5m6


def cases() -> Iterator[Case]:
    sizes = {"rows": "i32", "cols": "i32"}
    even = ("rows", "cols", "words", "stride_row")
    for dtype, variant, aligned in (("bf16", "", even), ("fp32", "", even), ("bf16", " ragged", ())):
        yield Case(
            name=f"quantize_e5m6 {dtype}{variant}",
            kernel=e5m6.quantize_kernel,
            types={
                "x": f"*{dtype}",
                "packed": "*i32" if aligned else "*u8",
                "scales": "*fp32",
                **sizes,
                "words": "i32",
                "stride_row": "i32",
            },
            constants={"WORDS": bool(aligned), "ROWS": e5m6.ROWS},
            aligned=("x", "packed", "scales", *aligned),
            options=e5m6.OPTIONS,
            ones=() if aligned else ("rows", "cols"),
        )
    for dtype, variant, aligned in (("bf16", "", even), ("fp32", "", even), ("bf16", " ragged", ())):
        yield Case(
            name=f"dequantize_e5m6 {dtype}{variant}",
            kernel=e5m6.dequantize_kernel,
            types={"packed": "*i32" if aligned else "*u8", "scales": "*fp32", "out": f"*{dtype}", **sizes},
            constants={"WORDS": bool(aligned), "ROWS": e5m6.ROWS},
            aligned=("packed", "scales", "out", *aligned[:2]),
            options=e5m6.OPTIONS,
            ones=() if aligned else ("rows", "cols"),
        )
