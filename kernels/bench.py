"""Check the FP8 kernels against float64, then time them.

    python -m kernels.bench [--json FILE]

On a GPU the Triton kernels are timed beside cuBLAS in BF16, and beside DeepGEMM where it is installed. On a
CPU only the references run: their times say what emulating FP8 costs there, and nothing about the kernels.
Times are medians; peers run in turns with ours, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kernels.figures import Row, against, at_most, show, write
from kernels.gemm import gemm
from kernels.linear import fp8_linear
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error
from kernels.quantize import (
    BLOCKS,
    TILES,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_reference,
    quantize_tiles,
)

CHECKED = ((1, 384, 256), (7, 129, 200), (129, 257, 385), (256, 512, 1024))  # M, N, K
CPU_SHAPES = ((512, 512, 512), (1024, 1024, 1024))
# Dense layers of the published model at 4096 tokens. DeepGEMM's own figure is for an H800.
GPU_SHAPES = ((4096, 7168, 2048), (4096, 4096, 7168), (4096, 7168, 16384))
DEEPGEMM_PUBLISHED = {(4096, 7168, 16384): 1358.0}

Timed = tuple[float, float]  # milliseconds: wall clock (of the GPU where there is one), CPU


def check(device: torch.device) -> list[Row]:
    """Errors of what the public functions run on `device`, worst over even and ragged shapes."""
    generator = torch.Generator().manual_seed(0)
    differing, errors = 0, {torch.float32: 0.0, torch.bfloat16: 0.0}
    for m, n, k in CHECKED:
        x, w = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
        a, b = quantize_tiles(x.to(device)), quantize_blocks(w.to(device))
        for found, expected in (
            (a, quantize_reference(x, TILES)),
            (b, quantize_reference(w, BLOCKS)),
        ):
            unlike = found.codes.cpu().view(torch.uint8) != expected.codes.view(torch.uint8)
            differing += int(unlike.sum()) + int((found.scales.cpu() != expected.scales).sum())
        for second in (b, quantize_tiles(w.to(device))):
            exact = dequantize(a).double() @ dequantize(second).double().t()
            for dtype in errors:
                errors[dtype] = max(errors[dtype], relative_error(gemm(a, second, dtype), exact))
    where = device.type
    rows = [
        at_most(f"gemm to FP32 on {where}: error against float64", "", errors[torch.float32], MAX_ERROR_FP32),
        at_most(
            f"gemm to BF16 on {where}: error against float64", "", errors[torch.bfloat16], MAX_ERROR_BF16
        ),
    ]
    if device.type == "cuda":  # on a CPU this would compare the reference with itself
        rows.append(at_most("quantisers on cuda: codes and scales unlike the reference", "", differing, 0))
    return rows


def time_cpu(m: int, n: int, k: int, repeats: int = 5) -> list[Row]:
    """Times of the references on the CPU beside an FP32 matmul and an FP32 linear layer."""
    x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    a, b = quantize_tiles(x), quantize_blocks(w)
    leaves = (x.clone().requires_grad_(), w.clone().requires_grad_())
    pairs: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("gemm reference", lambda: gemm(a, b), lambda: x @ w.t()),
        (
            "fp8_linear, 3 GEMMs",
            lambda: torch.autograd.grad(fp8_linear(*leaves), leaves, dy),
            lambda: torch.autograd.grad(torch.nn.functional.linear(*leaves), leaves, dy),
        ),
    ]
    rows = []
    for name, ours, peer in pairs:
        (wall, cpu), (peer_wall, peer_cpu) = _in_turns([ours, peer], _cpu_clock, repeats)
        label = f"{name} {m}x{n}x{k} on cpu"
        rows.append(against(f"{label}, wall", "ms", wall, peer_wall, "torch FP32"))
        rows.append(against(f"{label}, CPU time", "ms", cpu, peer_cpu, "torch FP32"))
    return rows


def time_gpu(m: int, n: int, k: int, repeats: int = 20) -> list[Row]:
    """Speeds of the Triton kernels on the GPU beside cuBLAS in BF16 and DeepGEMM."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    a, b = quantize_tiles(x), quantize_blocks(w)
    deep = _deepgemm(a, b)
    calls = [lambda: gemm(a, b, torch.bfloat16), lambda: x @ w.t(), lambda: quantize_tiles(x)]
    times = _in_turns(calls if deep is None else [*calls, deep], _gpu_clock, repeats)
    tflops = [2e-9 * m * n * k / wall for wall, _ in times]
    name, published = f"gemm {m}x{n}x{k}", DEEPGEMM_PUBLISHED.get((m, n, k))
    rows = [against(name, "TFLOPS", tflops[0], tflops[1], "cuBLAS BF16")]
    if deep is None:
        rows.append(Row(name, "TFLOPS", tflops[0], peer_name="DeepGEMM (not installed)", published=published))
    else:
        rows.append(against(name, "TFLOPS", tflops[0], tflops[3], "DeepGEMM", published))
    moved = x.nbytes + a.codes.nbytes + a.scales.nbytes
    rows.append(Row(f"quantize_tiles {m}x{k} BF16", "GB/s", 1e-6 * moved / times[2][0]))
    return rows


def _deepgemm(a: Quantized, b: Quantized) -> Callable[[], object] | None:
    """DeepGEMM's call on the same operands, or None where it is not installed.

    Raises:
        RuntimeError: its result is not that of `gemm`: a comparison of speeds would mean nothing.
    """
    if importlib.util.find_spec("deep_gemm") is None:
        return None
    import deep_gemm

    out = torch.empty((a.shape[0], b.shape[0]), device="cuda", dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        deep_gemm.fp8_gemm_nt((a.codes, a.scales), (b.codes, b.scales), out, disable_ue8m0_cast=True)
        return out

    error = relative_error(call(), gemm(a, b))
    if not error < MAX_ERROR_BF16:
        raise RuntimeError(
            f"kernels.bench: DeepGEMM differs from kernels.gemm by {error:.3g} on {tuple(a.shape)}"
        )
    return call


def _in_turns(
    calls: Sequence[Callable[[], object]], clock: Callable[[Callable[[], object]], Timed], repeats: int
) -> list[Timed]:
    """Median times of each call, run in turns after one untimed round."""
    for call in calls:
        call()
    rounds = [[clock(call) for call in calls] for _ in range(repeats)]
    return [
        (statistics.median(t[i][0] for t in rounds), statistics.median(t[i][1] for t in rounds))
        for i in range(len(calls))
    ]


def _cpu_clock(call: Callable[[], object]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def _gpu_clock(call: Callable[[], object]) -> Timed:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cpu = time.process_time()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), 1e3 * (time.process_time() - cpu)


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 1 if a check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description="Check and time the FP8 kernels."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        print(
            "No CUDA device: the PyTorch references run here; the Triton kernels are neither run nor timed."
        )
    rows = check(torch.device("cuda" if on_gpu else "cpu"))
    for shape in GPU_SHAPES if on_gpu else CPU_SHAPES:
        rows += time_gpu(*shape) if on_gpu else time_cpu(*shape)
    print(show(rows))
    if options.json:
        write(options.json, rows)
    return 1 if any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
