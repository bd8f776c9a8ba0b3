"""The kernel of square.py, for each function that launches it."""

from __future__ import annotations

from collections.abc import Iterator

from kernels import square
from kernels.cases.case import Case


def cases() -> Iterator[Case]:
    for name, source, cached, grouped, rows, block, even, power_of_two in (
        ("quantize_both", "bf16", False, False, True, False, True, False),
        ("quantize_both", "fp32", False, False, True, False, True, True),
        ("quantize_both ragged", "bf16", False, False, True, False, False, False),
        ("requantize_transpose", "fp8e4nv", True, False, False, False, True, False),
        ("requantize_transpose", "i32", True, False, False, False, True, True),
        ("quantize_blocks_both", "bf16", False, False, True, True, True, False),
        ("quantize_blocks_both", "fp32", False, False, True, True, True, False),
        ("quantize_tokens_both", "bf16", False, True, True, False, True, False),
        ("quantize_tokens", "bf16", False, True, False, False, True, False),
        ("requantize_tokens", "fp8e4nv", True, True, False, False, True, False),
    ):
        pointers = {"x": f"*{source}", "codes_t": "*fp8e4nv", "scales_t": "*fp32"}
        absent = {}
        for present, one, kind in (
            (cached, "x_scales", "*fp32"),
            (grouped, "offsets", "*i64"),
            (rows, "codes", "*fp8e4nv"),
            (rows, "scales", "*fp32"),
        ):
            if present:
                pointers[one] = kind
            else:
                absent[one] = None
        sizes = dict.fromkeys(
            ("rows", "cols", "read_cols", "width", "experts", "stride_matrix", "stride_row"), "i32"
        )
        yield Case(
            name=f"{name} {source}{' 2^n' if power_of_two else ''}",
            kernel=square.square_kernel,
            types={**pointers, **sizes, "stride_col": "1"},
            constants={
                **absent,
                "BLOCK": block,
                "E5M6": source == "i32",
                "POWER_OF_TWO": power_of_two,
                "EXPERTS": square.experts_range(256 if grouped else 0),
            },
            aligned=(
                *pointers,
                "read_cols",
                "stride_matrix",
                "stride_row",
                *(("rows", "cols", "width") if even else ()),
            ),
            options=square.OPTIONS,
        )
