"""The GEMM over whole matrices."""

from __future__ import annotations

from collections.abc import Iterator

from kernels import gemm, quantize
from kernels.cases.case import Case


def cases() -> Iterator[Case]:
    operands = {"a": "*fp8e4nv", "a_scales": "*fp32", "b": "*fp8e4nv", "b_scales": "*fp32"}
    for m, b_block, out, aligned in (
        (64, quantize.BLOCKS, "bf16", ("N",)),
        (64, quantize.TILES, "fp32", ("N",)),
        (64, quantize.TILES, "fp32", ()),
        (128, quantize.BLOCKS, "bf16", ("N",)),
        (128, quantize.BLOCKS, "fp32", ()),
    ):
        config = gemm.config_for(m, b_block)
        ragged = "" if aligned else " ragged"
        yield Case(
            name=f"gemm {config.block_m}x{config.block_n}, b in {b_block[0]}x{b_block[1]}, {out}{ragged}",
            kernel=gemm.gemm_kernel,
            types={**operands, "out": f"*{out}", "M": "i32", "N": "i32", "GROUPS": "i32"},
            constants={
                "B_TILES": b_block == quantize.TILES,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BAND": gemm.BAND,
            },
            aligned=(*operands, "out", *aligned),
            options=config.options,
            tensor_core=True,
        )
