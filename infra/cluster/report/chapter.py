"""What a plan is made of when it is told: chapters of figures, tables, remarks and drawings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.figures import Row

Cell = str | int | float | None
LEGEND = (
    "Beside published figures: holds or FAILS where ours must agree, to their last digit or exactly; misses "
    "where a prediction misses its goal of 5%; nothing where the distance is the finding."
)


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; numbers are written alike everywhere by `cell`."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"table {self.title!r}: a row of {len(row)} cells under {len(self.head)}")


@dataclass(frozen=True)
class Chapter:
    """One question that the plan answers."""

    title: str
    rows: tuple[Row, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    drawing: str = ""
    """An SVG, of the page alone."""


def beside(
    name: str,
    unit: str,
    ours: float,
    published: float,
    within: float | None = None,
    *,
    must: bool = False,
) -> Row:
    """A figure beside a published one. With `within`, a share, it holds if it is no further away.

    What `must` hold has no goal: it is wrong otherwise. Else `goal` is the limit on the side where `ours` is,
    and not to reach it is a finding.
    """
    ratio = ours / published if published else None
    holds = goal = None
    if within is not None:
        holds = abs(ours - published) <= within * abs(published)
        goal = None if must else published + (within if ours > published else -within) * abs(published)
    return Row(name, unit, ours, ratio=ratio, goal=goal, published=published, holds=holds)


def figure(name: str, unit: str, ours: float) -> Row:
    """A figure with nothing to stand beside."""
    return Row(name, unit, ours)


def cell(value: Cell) -> str:
    """A cell as text: five significant digits, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value) or math.isnan(value):
        return str(value)
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size >= 1e4:
        return f"{value:,.0f}"
    if size >= 1e-3:
        return f"{value:,.5g}"
    return f"{value:.3g}"


def figures(rows: Sequence[Row]) -> Table:
    """Rows of figures as a table: ours, published, how far apart, and whether that is near enough."""
    cells = []
    for row in rows:
        apart = None
        if row.ratio is not None and row.published is not None:
            apart = "equal" if row.ours == row.published else f"{100 * (row.ratio - 1):+.2f}%"
        state = (
            "" if row.holds is None else "holds" if row.holds else "FAILS" if row.goal is None else "misses"
        )
        cells.append((row.name, row.ours, row.unit, row.published, apart, state))
    return Table("", ("figure", "computed", "unit", "published", "apart", ""), tuple(cells))
