"""Plots of a stage's own figures, drawn from numbers and never from text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def read_jsonl(path: Path) -> list[dict[str, float]]:
    """The lines of a training log, each a dict of figures."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> None:
    """Lines of (xs, ys) by label, into a PNG; the folder is made."""
    figure, axes = _figure()
    for label, (xs, ys) in series.items():
        axes.plot(xs, ys, label=label, linewidth=1.2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(frameon=False)
    _save(figure, path)


def heat(
    path: Path, grid: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], x: str, y: str
) -> None:
    """Shares between 0 and 1 as a labelled grid, into a PNG."""
    figure, axes = _figure()
    axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _save(figure, path)


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, started at the first value."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else keep * out[-1] + (1 - keep) * value)
    return out


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), dpi=110)
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # Without a fixed software tag the file would name the library's version and the bytes would move with it.
    figure.savefig(path, metadata={"Software": None})
