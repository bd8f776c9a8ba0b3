"""A plan as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from infra.cluster.report.chapter import LEGEND, Chapter, Table, cell, figures

WIDTH = 110


def to_text(title: str, chapters: Iterable[Chapter]) -> str:
    """All chapters, one under the other."""
    parts = [title, "=" * len(title), "", textwrap.fill(LEGEND, WIDTH)]
    for chapter in chapters:
        parts += ["", chapter.title, "-" * len(chapter.title)]
        if chapter.rows:
            parts.append(_table(figures(chapter.rows)))
        for table in chapter.tables:
            parts += ["", *([table.title] if table.title else []), _table(table)]
        for note in chapter.notes:
            parts += ["", textwrap.fill(note, WIDTH)]
    return "\n".join(parts) + "\n"


def _table(table: Table) -> str:
    """Columns side by side: numbers to the right, text to the left; empty columns left out."""
    columns = list(zip(table.head, *([cell(value) for value in row] for row in table.rows), strict=True))
    kept = [index for index, column in enumerate(columns) if any(column[1:])]
    numbers = {
        index: all(not isinstance(row[index], str) for row in table.rows if row[index] is not None)
        for index in kept
    }
    lines = []
    for line in zip(*(columns[index] for index in kept), strict=True):
        fields = []
        for index, value in zip(kept, line, strict=True):
            width = max(map(len, columns[index]))
            fields.append(value.rjust(width) if numbers[index] else value.ljust(width))
        lines.append("  ".join(fields).rstrip())
    return "\n".join(lines)
