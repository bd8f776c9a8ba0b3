"""The GEMM for Hopper, with two and three warpgroups, for each type of output, by expert or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from kernels.backend import gl
from kernels.cases.case import Case
from kernels.gemms import hopper_gemm


def _descriptor(kind: str, rows: int) -> str:
    bits = {"fp8e4nv": 8, "bf16": 16}[kind]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    return f"tensordesc<{kind}[{rows},128],{layout!r}>"


def cases() -> Iterator[Case]:
    if gl is None:
        return
    for parts, by_expert, out in itertools.product((2, 3), (False, True), ("bf16", "fp32")):
        half = out == "bf16"
        types = {
            "a": _descriptor("fp8e4nv", 64),
            "a_scales": "*fp32",
            "b": _descriptor("fp8e4nv", 128),
            "b_scales": "*fp32",
            **dict.fromkeys(("EXPERTS", "M", "N", "GROUPS", "OUT_STRIDE"), "i32"),
        }
        absent: dict[str, Any] = {}
        for name, given, value in (
            ("out_tma", half, _descriptor("bf16", 64)),
            ("out", not half or by_expert, f"*{out}"),
            ("offsets", by_expert, "*i64"),
        ):
            (types if given else absent)[name] = value if given else None
        yield Case(
            name=f"hopper gemm {64 * parts}x128, {out}{', by expert' if by_expert else ''}",
            kernel=hopper_gemm.hopper_kernel,
            types=types,
            constants={
                **absent,
                "PARTS": parts,
                "BAND": 24 // parts,
                "STAGES": hopper_gemm.stages(parts, half),
            },
            aligned=("a_scales", "b_scales", "out", "offsets", "N", "OUT_STRIDE"),
            options={"num_warps": 4, "enable_fp_fusion": True},
            tensor_core=True,
            products=parts,
            tma=True,
            gluon=True,
            ones=("EXPERTS", "M", "GROUPS"),  # for N = 1, of no use, a few registers by expert are spilled
        )
