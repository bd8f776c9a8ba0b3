"""The quantisers of quantize.py."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases.case import Case
from kernels.formats import quantize


def cases() -> Iterator[Case]:
    sizes = {"rows": "i32", "cols": "i32"}
    outputs = {"codes": "*fp8e4nv", "scales": "*fp32"}
    matrix = {"stride_matrix": "i32"}
    row_major = {"stride_row": "i32", "stride_col": "1"}
    transposed = {"stride_row": "1", "stride_col": "i32"}
    even = ("rows", "cols", "stride_matrix", "stride_row", "stride_col")
    tile = ("quantize_tiles", quantize.tiles_kernel, "x", {"ROWS": quantize.TILE_ROWS}, quantize.TILE_OPTIONS)
    block = ("quantize_blocks", quantize.blocks_kernel, "w", {}, quantize.BLOCK_OPTIONS)
    for (name, kernel, source, constants, options), variant, dtype, strides, aligned, power_of_two in (
        (tile, "rows", "bf16", row_major, even, False),
        (tile, "ragged rows", "bf16", row_major, (), False),
        (tile, "columns", "bf16", transposed, even, False),
        (tile, "columns 2^n", "fp32", transposed, even, True),
        (block, "rows", "bf16", row_major, even, False),
        (block, "rows 2^n", "fp32", row_major, even, True),
    ):
        yield Case(
            name=f"{name} {dtype} {variant}",
            kernel=kernel,
            types={
                source: f"*{dtype}",
                **outputs,
                **sizes,
                **(matrix if name == "quantize_blocks" else {}),
                **strides,
            },
            constants={"POWER_OF_TWO": power_of_two, **constants},
            aligned=(
                source,
                "codes",
                "scales",
                *(one for one in aligned if name == "quantize_blocks" or one != "stride_matrix"),
            ),
            options=options,
            ones=("rows", "cols") if variant in ("ragged rows", "rows 2^n") else (),
        )
