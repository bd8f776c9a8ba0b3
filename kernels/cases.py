"""Every kernel in every configuration that the public functions launch: what `kernels.check` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernels import cross_entropy, e5m6, gemm, grouped_gemm, norm, permute, quantize, swiglu


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: what Triton's launcher would compile for such arguments.

    `types` gives every argument in order; "1" is an integer known to be 1 (a unit stride). Arguments of
    `aligned` are known to be multiples of 16, as the launcher finds them for usual sizes. A kernel that
    is not `exact` uses the hardware's exp and log, which are approximate.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]
    tensor_core: bool = False
    exact: bool = True


def cases() -> Iterator[Case]:
    """Every kernel, in every configuration that the public functions launch."""
    sizes = {"rows": "i32", "cols": "i32"}
    outputs = {"codes": "*fp8e4nv", "scales": "*fp32"}
    row_major = {"stride_row": "i32", "stride_col": "1"}
    transposed = {"stride_row": "1", "stride_col": "i32"}
    even = ("rows", "cols", "stride_row", "stride_col")
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
            types={source: f"*{dtype}", **outputs, **sizes, **strides},
            constants={"POWER_OF_TWO": power_of_two, **constants},
            aligned=(source, "codes", "scales", *aligned),
            options=options,
        )
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
    yield from _grouped_cases(operands)
    yield from _e5m6_cases()
    yield from _permute_cases()
    yield from _cross_entropy_cases()
    yield from _swiglu_cases()
    yield from _norm_cases()


def _grouped_cases(operands: dict[str, str]) -> Iterator[Case]:
    """The GEMMs over grouped tokens, few experts and many."""
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


def _e5m6_cases() -> Iterator[Case]:
    sizes = {"rows": "i32", "cols": "i32"}
    row_major = {"stride_row": "i32", "stride_col": "1"}
    even = ("rows", "cols", "stride_row", "stride_col")
    for dtype, variant, strides, aligned in (
        ("bf16", "rows", row_major, even),
        ("fp32", "rows", row_major, even),
        ("bf16", "ragged rows", row_major, ()),
        ("bf16", "columns", {"stride_row": "1", "stride_col": "i32"}, even),
    ):
        yield Case(
            name=f"quantize_e5m6 {dtype} {variant}",
            kernel=e5m6.quantize_kernel,
            types={"x": f"*{dtype}", "packed": "*u8", "scales": "*fp32", **sizes, **strides},
            constants={"ROWS": e5m6.ROWS},
            aligned=("x", "packed", "scales", *aligned),
            options=e5m6.OPTIONS,
        )
    for dtype, variant, aligned in (("bf16", "", even), ("fp32", "", even), ("bf16", " ragged", ())):
        yield Case(
            name=f"dequantize_e5m6 {dtype}{variant}",
            kernel=e5m6.dequantize_kernel,
            types={"packed": "*u8", "scales": "*fp32", "out": f"*{dtype}", **sizes},
            constants={"ROWS": e5m6.ROWS},
            aligned=("packed", "scales", "out", *aligned[:2]),
            options=e5m6.OPTIONS,
        )


def _permute_cases() -> Iterator[Case]:
    hidden = {"hidden": "i32"}
    for slots, dtype, aligned in ((8, "bf16", ("hidden",)), (8, "fp32", ("hidden",)), (1, "bf16", ())):
        name = f"{dtype}, {slots} slots" + ("" if aligned else ", ragged")
        for weighted, weights in ((True, "fp32"), (True, "bf16"), (False, "i64")):
            variant = f"{name}, weights {weights}" if weighted else name
            types = {"weights": f"*{weights}", "out": f"*{dtype}", **hidden}
            constants = {"K": slots, "WEIGHTED": weighted, "BLOCK": permute.BLOCK}
            yield Case(
                name=f"gather {variant}",
                kernel=permute.gather_kernel,
                types={"x": f"*{dtype}", "pair": "*i64", **types},
                constants=constants,
                aligned=("x", "pair", "weights", "out", *aligned),
                options=permute.OPTIONS,
            )
            yield Case(
                name=f"combine {variant}",
                kernel=permute.combine_kernel,
                types={"y": f"*{dtype}", "place": "*i64", **types},
                constants=constants,
                aligned=("y", "place", "weights", "out", *aligned),
                options=permute.OPTIONS,
            )
        yield Case(
            name=f"weight_gradient {name}",
            kernel=permute.weight_gradient_kernel,
            types={"y": f"*{dtype}", "grad": f"*{dtype}", "place": "*i64", "out": "*fp32", **hidden},
            constants={"K": slots, "BLOCK": permute.BLOCK},
            aligned=("y", "grad", "place", "out", *aligned),
            options=permute.OPTIONS,
        )


def _cross_entropy_cases() -> Iterator[Case]:
    for dtype, gradient, aligned in (
        ("bf16", True, ("vocabulary",)),
        ("bf16", False, ("vocabulary",)),
        ("fp32", True, ("vocabulary",)),
        ("fp32", True, ()),
    ):
        yield Case(
            name=f"cross_entropy {dtype}{', gradient' * gradient}{'' if aligned else ', ragged'}",
            kernel=cross_entropy.softmax_kernel,
            types={
                "logits": f"*{dtype}",
                "targets": "*i64",
                "losses": "*fp32",
                "vocabulary": "i32",
                "z_loss": "fp32",
            },
            constants={"GRADIENT": gradient, "BLOCK": cross_entropy.BLOCK},
            aligned=("logits", "targets", "losses", *aligned),
            options=cross_entropy.OPTIONS,
            exact=False,
        )


def _swiglu_cases() -> Iterator[Case]:
    """The kernels of swiglu.py, from each kind of input, with and without routing weights."""
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
            },
            aligned=(*inputs, *weight, *outputs, *aligned),
            options=swiglu.OPTIONS,
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
        )


def _norm_cases() -> Iterator[Case]:
    """The kernels of norm.py."""
    strides = {"stride_row": "i32", "stride_col": "1"}
    both_strides = {"dy_stride_row": "i32", "dy_stride_col": "1", **strides}
    even = ("cols", "stride_row")
    for dtype, aligned, power_of_two in (("bf16", even, False), ("bf16", (), False), ("fp32", even, True)):
        pointers = {"x": f"*{dtype}", "weight": f"*{dtype}"}
        outputs = {"codes": "*fp8e4nv", "scales": "*fp32", "inverse": "*fp32"}
        name = f"{dtype}{'' if aligned else ' ragged'}"
        yield Case(
            name=f"rmsnorm_quantize {name}{' 2^n' if power_of_two else ''}",
            kernel=norm.quantize_kernel,
            types={**pointers, **outputs, "cols": "i32", "eps": "fp32", **strides},
            constants={"POWER_OF_TWO": power_of_two},
            aligned=(*pointers, *outputs, *aligned),
            options=norm.OPTIONS,
        )
        even_dy = ("dy_stride_row",) if aligned else ()
        pointers = {"dy": f"*{dtype}", **pointers, "inverse": "*fp32"}
        yield Case(
            name=f"rmsnorm_backward dx {name}",
            kernel=norm.dx_kernel,
            types={**pointers, "dx": f"*{dtype}", "cols": "i32", **both_strides},
            constants={},
            aligned=(*pointers, "dx", *aligned, *even_dy),
            options=norm.OPTIONS,
        )
        pointers = {"dy": f"*{dtype}", "x": f"*{dtype}", "inverse": "*fp32", "partial": "*fp32"}
        yield Case(
            name=f"rmsnorm_backward dweight {name}",
            kernel=norm.dweight_kernel,
            types={**pointers, "rows": "i32", "cols": "i32", **both_strides},
            constants={"SLAB": norm.SLAB},
            aligned=(*pointers, *aligned, *even_dy),
            options=norm.OPTIONS,
        )
