"""How long sums on Hopper's FP8 tensor core lose precision, and what promotion to FP32 saves (DeepSeek-V3
report, section 3.3.2 and figure 7b; ISCA 2025 paper, section 3.1.1).

The tensor core is that of `kernels.gemms.tensor_core`. Errors are against float64 sums of the same E4M3
codes, so they are those of the sums alone. The report's "nearly 2%" for K = 4096 names neither data nor
measure, and the register's part in the alignment is not published, so figures are given for two of each:

    positive   uniform in [0, 1): all outputs are alike, and the error is the largest relative one
    normal     standard normal: outputs near zero have no meaningful relative error, and the error is the
               largest one over the root mean square of all outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.figures import Row, at_most
from kernels.formats.quantize import E4M3_MAX
from kernels.gemms.tensor_core import HOPPER, TensorCore, promoted_sum
from kernels.metrics import MAX_ERROR_FP32, relative_error

SIZE = 64
"""Rows and columns of the output: 4096 sums."""
LENGTH = 4096
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
INTERVALS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DATA = ("positive", "normal")
CORES = {"apart": HOPPER, "joined": replace(HOPPER, joins=True)}
"""The register added to the aligned products, or aligned with them."""
PUBLISHED = 2.0
"""Percent: largest relative error at K = 4096 without promotion."""


@dataclass(frozen=True)
class Loss:
    """The error of one kind of sum."""

    data: str
    core: str
    length: int
    interval: int
    """Products between promotions; `length` or more: there is none."""
    largest: float
    """Largest error; of positive data relative, of normal data over the root mean square of the outputs."""
    frobenius: float


def measure(
    length: int = LENGTH,
    lengths: Sequence[int] = LENGTHS,
    intervals: Sequence[int] = INTERVALS,
    size: int = SIZE,
    seed: int = 0,
) -> list[Loss]:
    """Every interval at `length`, and every length without promotion and with it each 128."""
    pairs = [(length, interval) for interval in intervals]
    pairs += [(other, interval) for other in lengths for interval in (128, other)]
    losses = []
    for data in DATA:
        for k in sorted({k for k, _ in pairs}):
            a, b = (operand(data, size, k, seed + side) for side in (0, 1))
            exact = a.double() @ b.double().t()
            for name, core in CORES.items():
                for interval in sorted({interval for of, interval in pairs if of == k}):
                    losses.append(_loss(data, name, core, a, b, interval, exact))
    return losses


def _loss(data: str, name: str, core: TensorCore, a: Tensor, b: Tensor, interval: int, exact: Tensor) -> Loss:
    out = promoted_sum(a, b, interval, core).double()
    beside = exact.abs() if data == "positive" else exact.square().mean().sqrt()
    largest = float(((out - exact).abs() / beside).max())
    return Loss(data, name, a.shape[1], interval, largest, relative_error(out, exact))


def operand(data: str, size: int, length: int, seed: int) -> Tensor:
    """E4M3 codes [size, length], the largest of them 448."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if data == "positive" else torch.randn
    values = draw(size, length, generator=generator)
    return (values / values.abs().max() * E4M3_MAX).to(torch.float8_e4m3fn)


def rows(losses: Sequence[Loss]) -> list[Row]:
    """The figures, as percentages; and whether promotion every 128 keeps every sum within the limit that the
    GEMM kernels are tested with."""
    found = []
    for loss in losses:
        promoted = loss.interval < loss.length
        how = f"FP32 every {loss.interval}" if promoted else "never promoted"
        label = f"{loss.data}, register {loss.core}, K {loss.length}, {how}"
        published = PUBLISHED if loss.length == LENGTH and not promoted else None
        found.append(Row(f"{label}: largest error", "%", 100 * loss.largest, published=published))
        found.append(Row(f"{label}: Frobenius error", "%", 100 * loss.frobenius))
    worst = max(loss.frobenius for loss in losses if loss.interval == 128)
    found.append(at_most("FP32 every 128, worst Frobenius error", "%", 100 * worst, 100 * MAX_ERROR_FP32))
    return found


def plot(losses: Sequence[Loss], file: Path) -> None:
    """Largest errors over the interval at one length, and over the length."""
    from matplotlib.figure import Figure

    length = max(loss.length for loss in losses if loss.interval not in (128, loss.length))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (data, core) in enumerate((data, core) for data in DATA for core in CORES):
        alike = sorted(
            (loss for loss in losses if (loss.data, loss.core) == (data, core)),
            key=lambda loss: (loss.length, loss.interval),
        )
        line = [loss for loss in alike if loss.length == length]
        look = {"color": f"C{number}", "marker": "o", "label": f"{data}, register {core}"}
        left.plot([loss.interval for loss in line], [100 * loss.largest for loss in line], **look)
        never = [loss for loss in alike if loss.interval == loss.length]
        right.plot([loss.length for loss in never], [100 * loss.largest for loss in never], **look)
        every = [loss for loss in alike if loss.interval == 128]
        look = {"color": f"C{number}", "marker": ".", "linestyle": "--"}
        right.plot([loss.length for loss in every], [100 * loss.largest for loss in every], **look)
    left.axhline(PUBLISHED, color="grey", linewidth=1)
    left.annotate("published, never promoted", (INTERVALS[0], PUBLISHED), va="bottom", color="grey")
    left.set(xlabel=f"products between promotions, K = {length}", ylabel="% largest error", yscale="log")
    right.set(xlabel="K; never promoted, and every 128 (dashed)")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
    left.legend(loc="lower right")
    figure.savefig(file, dpi=110)
