"""The kernel of square.py, for each function that launches it."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases.case import Case
from kernels.formats import square

EVEN = ("rows", "cols", "width")
RAGGED = ("cols", "width")  # the launcher pads these two
# What is read, what is written, and whether there is one scale for a square.
KINDS = {
    "quantize_both": (("x",), ("codes", "scales"), False),
    "quantize_blocks_both": (("x",), ("codes", "scales"), True),
    "requantize_transpose": (("x", "x_scales"), (), False),
    "quantize_tokens": (("x", "offsets"), (), False),
    "quantize_tokens_both": (("x", "offsets"), ("codes", "scales"), False),
    "requantize_tokens": (("x", "x_scales", "offsets"), (), False),
}
TYPES = {"x_scales": "*fp32", "codes": "*fp8e4nv", "scales": "*fp32"}


def cases() -> Iterator[Case]:
    sizes = dict.fromkeys(("rows", "cols", "width", "experts", "stride_matrix", "stride_row"), "i32")
    for name, source, aligned, power_of_two, experts, offsets in (
        ("quantize_both", "bf16", EVEN, False, 0, ""),
        ("quantize_both", "bf16", RAGGED, False, 0, ""),
        ("quantize_both", "fp32", EVEN, True, 0, ""),
        ("quantize_blocks_both", "bf16", EVEN, False, 0, ""),
        ("quantize_blocks_both", "fp32", EVEN, False, 0, ""),
        ("quantize_blocks_both", "fp32", RAGGED, True, 0, ""),
        ("requantize_transpose", "fp8e4nv", EVEN, False, 0, ""),
        ("requantize_transpose", "fp8e4nv", RAGGED, True, 0, ""),
        ("requantize_transpose", "i32", EVEN, False, 0, ""),
        ("requantize_transpose", "i32", RAGGED, True, 0, ""),
        ("quantize_tokens", "bf16", EVEN, False, 256, "i64"),
        ("quantize_tokens_both", "bf16", RAGGED, False, 256, "i64"),
        ("quantize_tokens_both", "fp32", RAGGED, True, 8, "i32"),
        ("requantize_tokens", "fp8e4nv", RAGGED, False, 256, "i64"),
        ("requantize_tokens", "fp8e4nv", RAGGED, True, 8, "i32"),
    ):
        inputs, outputs, block = KINDS[name]
        types = {
            **TYPES,
            "x": f"*{source}",
            "offsets": f"*{offsets}",
            "codes_t": "*fp8e4nv",
            "scales_t": "*fp32",
        }
        patches = square.patches_for(both=bool(outputs), block=block)
        present = (*inputs, *outputs, "codes_t", "scales_t")
        ragged = [size for size in EVEN if size not in aligned and not (experts and size == "rows")]
        yield Case(
            name=f"{name} {source}{', 2^n' * power_of_two}{f', {experts} experts' if experts else ''}"
            + (f", ragged {' '.join(ragged)}" if ragged else ""),
            kernel=square.square_kernel,
            types={**{one: types[one] for one in present}, **sizes, "stride_col": "1"},
            constants={
                **{one: None for one in types if one not in present},
                "BLOCK": block,
                "E5M6": source == "i32",
                "POWER_OF_TWO": power_of_two,
                "EXPERTS": square.experts_range(experts),
                "ROWS": patches.rows,
            },
            aligned=(*present, "stride_matrix", "stride_row", *aligned),
            options=patches.options,
            ones=("rows", "experts"),
        )
