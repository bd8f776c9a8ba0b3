"""The kernels of norm.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.cases.case import Case
from kernels.fused import norm


def cases() -> Iterator[Case]:
    strides = {"stride_row": "i32", "stride_col": "1"}
    both_strides = {"dy_stride_row": "i32", "dy_stride_col": "1", **strides}
    even = ("cols", "stride_row")
    bf16, fp32 = norm.QUANTIZE_OPTIONS[torch.bfloat16], norm.QUANTIZE_OPTIONS[torch.float32]
    for dtype, aligned, power_of_two, steps, options in (
        ("bf16", even, False, 7, bf16),
        ("bf16", even, False, 2, bf16),
        ("bf16", (), False, 2, bf16),
        ("fp32", even, True, 7, fp32),
        ("bf16", even, True, 16, bf16),
    ):
        pointers = {"x": f"*{dtype}", "weight": f"*{dtype}"}
        outputs = {"codes": "*fp8e4nv", "scales": "*fp32", "inverse": "*fp32"}
        name = f"{dtype}{'' if aligned else ' ragged'}"
        yield Case(
            name=f"rmsnorm_quantize {name}{' 2^n' if power_of_two else ''}, {steps} steps",
            kernel=norm.quantize_kernel,
            types={**pointers, **outputs, "cols": "i32", "eps": "fp32", **strides},
            constants={"POWER_OF_TWO": power_of_two, "STEPS": steps},
            aligned=(*pointers, *outputs, *aligned),
            options=options,
            ones=() if aligned else ("cols",),
        )
        even_dy = ("dy_stride_row",) if aligned else ()
        pointers = {"dy": f"*{dtype}", **pointers, "inverse": "*fp32", "dx": f"*{dtype}", "partial": "*fp32"}
        shape = norm.backward_shape(steps, torch.bfloat16 if dtype == "bf16" else torch.float32)
        yield Case(
            name=f"rmsnorm_backward {name}, {steps} steps",
            kernel=norm.backward_kernel,
            types={**pointers, "rows": "i32", "cols": "i32", **both_strides},
            constants={"SLAB": norm.SLAB, "STEPS": steps, "ROWS": shape.pop("ROWS")},
            aligned=(*pointers, *aligned, *even_dy),
            options=shape,
            ones=() if aligned else ("rows",),
        )
        if aligned and steps != 7:  # the kernel below is the same for every width
            continue
        yield Case(
            name=f"rmsnorm_backward sum {name}",
            kernel=norm.sum_kernel,
            types={"partial": "*fp32", "d_weight": f"*{dtype}", "slabs": "i32", "cols": "i32"},
            constants={"SUMMED": norm.SUMMED},
            aligned=("partial", "d_weight", *(one for one in aligned if one == "cols")),
            options=norm.OPTIONS,
            ones=() if aligned else ("slabs", "cols"),
        )
