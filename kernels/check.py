"""Compile every Triton kernel for Hopper (sm_90), without a GPU, and read what the compiler made of it.

    python -m kernels.check [--json FILE] [--jobs N]

Each kernel is compiled as its public function launches it. It must keep within the shared memory of one
thread block, spill no register and round every operation as IEEE 754 says (no approximate division, no
flushing of subnormals; only the cross-entropy and attention take the hardware's exp and log). A GEMM must
load its operands by TMA and sum each group of 128 on the FP8 tensor cores (four instructions of 32), and
attention must multiply BF16 on them. Promotions beside wgmma are FP32 operations issued while a product is
under way; the others wait for it. This shows how the kernels compile, not that they are right: that takes
their references, and a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.backend import triton
from kernels.cases import cases
from kernels.cases.case import Case
from kernels.figures import Row, at_least, at_most, show, write
from kernels.formats import quantize

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one thread block of an H100 may use
WGMMA_K = 32  # FP8 products along K that one tensor-core instruction sums


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
    bf16_wgmma: int
    tma_loads: int
    beside_wgmma: int

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
            fewest = self.case.products * quantize.TILE // WGMMA_K
            rows.append(at_least(f"{name}: FP8 wgmma", "", self.wgmma, fewest))
            rows.append(Row(f"{name}: promotions beside wgmma", "", self.beside_wgmma))
        if self.case.bf16_tensor_core:
            rows.append(at_least(f"{name}: BF16 wgmma", "", self.bf16_wgmma, 1))
        if self.case.tma:
            rows.append(at_least(f"{name}: TMA loads", "", self.tma_loads, 1))
        return rows


def compile_case(case: Case) -> Compiled:
    """Compile one case for sm_90 and inspect the binary.

    Raises:
        RuntimeError: the process imported the kernels under TRITON_INTERPRET, or without Triton.
    """
    _require_compiler()
    if not isinstance(case.kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels.check: TRITON_INTERPRET is set, which replaces the compiler; unset it")
    names = case.kernel.arg_names
    constants = {**case.constants, **{name: 1 for name, kind in case.types.items() if kind == "1"}}
    source = _source(case)(
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
        wgmma=sass.count("QGMMA"),
        bf16_wgmma=sass.count("HGMMA"),
        tma_loads=sass.count("UTMALDG"),
        beside_wgmma=_beside_wgmma(sass),
    )


def _source(case: Case) -> Any:
    if not case.gluon:
        return triton.compiler.ASTSource
    from triton.experimental.gluon._runtime import (
        GluonASTSource,  # what its launcher uses; there is no other name
    )

    return GluonASTSource


def _beside_wgmma(sass: str) -> int:
    """FP32 multiplications and additions between the issue of an FP8 wgmma and the wait for it."""
    count, under_way = 0, False
    for name in re.findall(r"\b(QGMMA|WARPGROUP\.DEPBAR|FFMA)\b", sass):
        count += under_way and name == "FFMA"
        under_way = name == "QGMMA" or (under_way and name == "FFMA")
    return count


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack and disassembly of a compiled kernel, by the tools inside Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _run(triton.knobs.nvidia.nvdisasm.path, str(path))
    figures = dict(part.split(":", 1) for part in usage.split() if part.count(":") == 1)
    return int(figures["REG"]), int(figures["STACK"]), sass


def _require_compiler() -> None:
    if triton is None:
        raise RuntimeError("kernels.check: Triton is not installed; install triton>=3.6")


def _rows_of(index: int) -> list[Row]:
    """The figures of one case by its number: the case itself holds a kernel, which no other process takes."""
    return compile_case(next(itertools.islice(cases(), index, None))).rows()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 1 if a limit is broken, or if the kernels cannot be compiled here."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.check", description="Compile the kernels for sm_90."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="compilers side by side (a core each)"
    )
    options = parser.parse_args(arguments)
    rows = []
    try:
        _require_compiler()
        # Fresh processes: threads of this one may hold locks that a fork would copy.
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(_rows_of, range(sum(1 for _ in cases()))):
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
