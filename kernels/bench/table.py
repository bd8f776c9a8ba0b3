"""Tables of figures that `python -m kernels.bench` wrote, a line a case, in Markdown.

python -m kernels.bench.table FILE...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernels.figures import Row, number

TIMED = "| kernel | µs | speed | of ceiling | beside others |\n| --- | ---: | ---: | ---: | --- |"
CHECKED = "| check | error | limit | |\n| --- | ---: | ---: | --- |"
VERSIONS = ("torch", "triton", "cuda", "driver")


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each timed case: those that bear the name of a row in microseconds."""
    rows = list(rows)
    names = dict.fromkeys(row.name for row in rows if row.unit == "us")
    return {name: [row for row in rows if row.name == name] for name in names}


def cells(rows: Iterable[Row], *, speeds: bool = True) -> tuple[str, str, str, str]:
    """Time, speed, share of the ceiling and comparisons (the others' `speeds` too) of one case, as text."""
    time = speed = share = ""
    others = []
    for row in rows:
        if row.unit == "us":
            time = _three_digits(row.ours)
        elif row.unit == "of ceiling":
            share = f"{row.ours:.2f}{_goal(row)}"
        elif row.peer_name is None:
            speed = f"{_three_digits(row.ours)} {row.unit}{_goal(row)}"
        elif row.ratio is not None:
            published = "" if row.published is None else f", published {_three_digits(row.published)}"
            theirs = f" at {_three_digits(row.peer)}{published}" if speeds else ""
            others.append(f"{row.ratio:.2f}x {row.peer_name}{theirs}{_goal(row)}")
    return time, speed, share, "; ".join(others)


def _goal(row: Row) -> str:
    return "" if row.goal is None else f" ({'goal' if row.holds else 'misses'} {number(row.goal)})"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def line(name: str, rows: Iterable[Row]) -> str:
    """One case as a line of plain text."""
    time, speed, share, others = cells(rows, speeds=False)
    return f"{name:<46} {time:>6} us  {speed}, {share} of ceiling; {others}"


def markdown(machine: dict[str, Any], rows: list[Row]) -> str:
    """What was timed and what was checked, as text. Empty where there is neither."""
    timed = [f"| {name} | {' | '.join(cells(found))} |" for name, found in by_case(rows).items()]
    checked = [
        f"| {row.name} | {number(row.ours)} | {number(row.goal)} | {'holds' if row.holds else 'FAILS'} |"
        for row in rows
        if row.unit == "" and row.goal is not None
    ]
    parts = ["\n".join([head, *lines]) for head, lines in ((TIMED, timed), (CHECKED, checked)) if lines]
    failed = [f"{row.name}: FAILED" for row in rows if row.goal is None and row.holds is False]
    ceilings = [
        f"{row.name} {_three_digits(row.ours)} {row.unit}" for row in rows if row.name[:7] == "ceiling"
    ]
    parts += ["; ".join(sentence) + "." for sentence in (failed, ceilings) if sentence]
    if not parts:
        return ""
    versions = [f"{name} {machine[name]}" for name in VERSIONS if machine.get(name)]
    return "\n\n".join([f"On {machine['gpu'] or machine['cpu']}, {', '.join(versions)}:", *parts])


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Machine and rows of a file."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return report["machine"], [Row(**row) for row in report["rows"]]


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 1 if a file has no figures of this benchmark."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.table", description="Figures as Markdown.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what kernels.bench --json wrote")
    code = 0
    for path in parser.parse_args(arguments).files:
        table = markdown(*read(path))
        if table:
            print(table)
        else:
            print(f"{path}: no kernel was timed or checked", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
