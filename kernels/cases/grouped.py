"""The GEMMs over grouped tokens, few experts and many."""

from __future__ import annotations

from collections.abc import Iterator

from kernels import gemm, grouped_gemm
from kernels.cases.case import Case


def cases() -> Iterator[Case]:
    operands = {"a": "*fp8e4nv", "a_scales": "*fp32", "b": "*fp8e4nv", "b_scales": "*fp32"}
    grouped = {"TOKENS": "i32", "NUM_EXPERTS": "i32", "N": "i32", "GROUPS": "i32"}
    along_tokens = {"N": "i32", "K": "i32", "GROUPS": "i32"}
    rows = ("grouped_gemm", grouped_gemm.grouped_gemm_kernel, grouped)
    sums = ("grouped_gemm_k", grouped_gemm.grouped_gemm_k_kernel, along_tokens)
    for (name, kernel, sizes), config, experts, offsets, out, aligned in (
        (rows, gemm.SMALL, 256, "i64", "bf16", ("TOKENS", "N")),
        (rows, gemm.SMALL, 8, "i32", "fp32", ()),
        (rows, gemm.LARGE, 256, "i64", "bf16", ("TOKENS", "N")),
        (rows, gemm.LARGE, 8, "i32", "fp32", ()),
        (sums, grouped_gemm.SUMS, 256, "i64", "fp32", ("N", "K")),
        (sums, grouped_gemm.SUMS, 8, "i32", "fp32", ()),
    ):
        ragged = "" if aligned else " ragged"
        yield Case(
            name=f"{name} {config.block_m}x{config.block_n}, {experts} experts, {out}{ragged}",
            kernel=kernel,
            types={**operands, "offsets": f"*{offsets}", "out": f"*{out}", **sizes},
            constants={
                "EXPERTS": grouped_gemm.experts_range(experts),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BAND": gemm.BAND,
            },
            aligned=(*operands, "offsets", "out", *aligned),
            options=config.options,
            tensor_core=True,
        )
