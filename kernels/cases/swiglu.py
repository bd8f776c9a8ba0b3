"""The kernels of swiglu.py, from each kind of input, with and without routing weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels.cases.case import Case
from kernels.fused import swiglu


def cases() -> Iterator[Case]:
    even = ("width", "stride_row")
    strides = {"stride_row": "i32", "stride_col": "1"}
    dy_strides = {"dy_stride_row": "i32", "dy_stride_col": "1"}
    for dtype, weights, aligned, power_of_two in (
        ("bf16", None, even, False),
        ("bf16", "bf16", (), False),
        ("fp32", "fp32", even, True),
        ("fp8e4nv", "fp32", even, False),
        ("fp8e4nv", None, even, True),
        ("fp8e4nv", "fp32", (), False),
    ):
        cached = dtype == "fp8e4nv"
        inputs = {"both": f"*{dtype}", **({"both_scales": "*fp32"} if cached else {})}
        absent: dict[str, Any] = {} if cached else {"both_scales": None}
        whole = {"WHOLE": bool(aligned)}
        name = f"{dtype}, {weights or 'no'} weights{'' if aligned else ' ragged'}"
        weight = {"weights": f"*{weights}"} if weights else {}
        outputs = {"codes": "*fp8e4nv", "scales": "*fp32"}
        yield Case(
            name=f"swiglu_quantize {name}{' 2^n' if power_of_two else ''}",
            kernel=swiglu.quantize_kernel,
            types={**inputs, **weight, **outputs, "width": "i32", **strides},
            constants={
                **absent,
                **({} if weights else {"weights": None}),
                **whole,
                "POWER_OF_TWO": power_of_two,
                "TILES": swiglu.QUANTIZED_TILES,
            },
            aligned=(*inputs, *weight, *outputs, *aligned),
            options=swiglu.OPTIONS,
            ones=() if aligned else ("width",),
        )
        dy = "fp32" if dtype == "fp32" else "bf16"
        gradients = {"d_both": f"*{dy}", **({"d_weights": f"*{weights}"} if weights else {})}
        yield Case(
            name=f"swiglu_backward {name}",
            kernel=swiglu.backward_kernel,
            types={"dy": f"*{dy}", **inputs, **weight, **gradients, "width": "i32", **dy_strides, **strides},
            constants={**absent, **({} if weights else {"weights": None, "d_weights": None}), **whole},
            aligned=("dy", *inputs, *weight, *gradients, *aligned, *(("dy_stride_row",) if aligned else ())),
            options=swiglu.OPTIONS,
            ones=() if aligned else ("width",),
        )
