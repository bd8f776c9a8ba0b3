"""The one form of this folder's figures: {"machine": {...}, "rows": [{...}]}, as JSON or as a table.

`ratio` is ours / peer. `goal` is a limit that `holds` says was kept. What does not apply is null.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    unit: str
    ours: float | None
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None
    goal: float | None = None
    published: float | None = None
    holds: bool | None = None


def against(
    name: str, unit: str, ours: float, peer: float, peer_name: str, published: float | None = None
) -> Row:
    """A row that compares with a peer: no goal, the ratio is the finding."""
    return Row(name, unit, ours, peer, peer_name, ratio=ours / peer, published=published)


def at_most(name: str, unit: str, ours: float, goal: float) -> Row:
    """A row that must not exceed `goal`. NaN does not hold."""
    return Row(name, unit, ours, goal=goal, holds=ours <= goal)


def at_least(name: str, unit: str, ours: float, goal: float) -> Row:
    """A row that must reach `goal`. NaN does not hold."""
    return Row(name, unit, ours, goal=goal, holds=ours >= goal)


def guarded(name: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows, and where an exception ends them one that says so: it must not hide the figures of others.

    Such a row has no `goal` and does not hold, which tells it from a goal that is missed.
    """
    try:
        yield from rows()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        yield Row(f"{name}: {type(error).__name__}: {reason}", "", None, holds=False)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch  # here, so that reading and writing figures needs no torch

    on_gpu = torch.cuda.is_available()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def show(rows: Iterable[Row]) -> str:
    """The rows as lines of text, one figure a line."""
    lines = []
    for row in rows:
        text = f"{row.name:<58} {number(row.ours):>10} {row.unit}"
        if row.goal is None and row.holds is False:
            text += "  FAILED"
        elif row.goal is not None:
            text += f"  (goal {number(row.goal)}: {'holds' if row.holds else 'FAILS'})"
        if row.peer_name is not None:
            text += f"  {row.peer_name} {number(row.peer)}"
        if row.ratio is not None:
            text += f"  ratio {row.ratio:.2f}"
        if row.published is not None:
            text += f"  published {number(row.published)}"
        lines.append(text)
    return "\n".join(lines)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows and the machine to `path` as JSON."""
    report = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def number(value: float | None) -> str:
    """A figure in six digits, a small one in three."""
    return "-" if value is None else f"{value:.6g}" if abs(value) >= 1 else f"{value:.3g}"


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip()


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
