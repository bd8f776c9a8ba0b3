"""Compile every Triton kernel for Hopper (sm_90), without a GPU, and read what the compiler made of it.

    python -m kernels.check [--json FILE]

Each kernel is compiled as its public function launches it. It must keep within the shared memory of one
thread block, spill no register and round every operation as IEEE 754 says (no approximate division, no
flushing of subnormals; only the cross-entropy takes the hardware's exp and log), and a GEMM must sum each
group of 128 on the FP8 tensor cores (four instructions of 32). This shows how the kernels compile, not that
they are right: that takes their references, and a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels import cross_entropy, e5m6, gemm, grouped_gemm, permute, quantize
from kernels.backend import triton
from kernels.figures import Row, at_least, at_most, show, write

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one thread block of an H100 may use
WGMMA_K = 32  # FP8 products along K that one tensor-core instruction sums


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


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    case: Case
    shared: int
    registers: int
    stack: int
    spills: int
    approximate: int
    wgmma: int

    def rows(self) -> list[Row]:
        """The case's figures, with the limits that they must keep."""
        name = self.case.name
        rows = [
            at_most(f"{name}: shared memory", "B", self.shared, SHARED_LIMIT),
            at_most(f"{name}: stack and spills", "", self.stack + self.spills, 0),
            at_most(f"{name}: approximate arithmetic", "", self.approximate, 0)
            if self.case.exact
            else Row(f"{name}: approximate arithmetic", "", self.approximate),
            Row(f"{name}: registers a thread", "", self.registers),
        ]
        if self.case.tensor_core:
            # Fewer would mean that part of the product does not run on the FP8 tensor cores.
            rows.append(at_least(f"{name}: FP8 wgmma", "", self.wgmma, quantize.TILE // WGMMA_K))
        return rows


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


def compile_case(case: Case) -> Compiled:
    """Compile one case for sm_90 and inspect the binary.

    Raises:
        RuntimeError: the process imported the kernels under TRITON_INTERPRET, or without Triton.
    """
    if triton is None:
        raise RuntimeError("kernels.check: Triton is not installed; install triton>=3.6")
    if not isinstance(case.kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels.check: TRITON_INTERPRET is set, which replaces the compiler; unset it")
    names = case.kernel.arg_names
    constants = {**case.constants, **{name: 1 for name, kind in case.types.items() if kind == "1"}}
    source = triton.compiler.ASTSource(
        fn=case.kernel,
        signature={name: "constexpr" if name in constants else case.types[name] for name in names},
        constexprs=constants,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in case.aligned if name not in constants
        },
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    kernel = triton.compile(source, target=target, options=case.options)
    registers, stack, sass = _inspect(kernel.asm["cubin"])
    return Compiled(
        case=case,
        shared=kernel.metadata.shared,
        registers=registers,
        stack=stack,
        spills=sum(" STL" in line or " LDL" in line for line in sass.splitlines()),
        approximate=len(re.findall(r"\.(?:approx|full|ftz)\b", kernel.asm["ptx"])),
        wgmma=sum("QGMMA" in line for line in sass.splitlines()),
    )


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack and disassembly of a compiled kernel, by the tools inside Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _run(triton.knobs.nvidia.nvdisasm.path, str(path))
    figures = dict(part.split(":", 1) for part in usage.split() if part.count(":") == 1)
    return int(figures["REG"]), int(figures["STACK"]), sass


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 1 if a limit is broken, or if the kernels cannot be compiled here."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.check", description="Compile the kernels for sm_90."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(arguments)
    rows = []
    try:
        for case in cases():
            found = compile_case(case).rows()
            print(show(found), flush=True)
            rows += found
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write(options.json, rows)
    failed = [row.name for row in rows if row.holds is False]
    print(f"{len(failed)} of {len(rows)} figures break their limit" if failed else "all limits hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
