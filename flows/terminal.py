"""What a run looks like in a terminal: a line an event, progress bars where there is one, a summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows.execute import Outcome
from flows.report import Curve, Report
from flows.report_page import duration, label, number

# Without a terminal a progress line comes at most this often, in seconds.
_EVERY = 15.0
_COLOURS = {"built": "green", "resumed": "green", "cached": "dim", "given": "dim", "failed": "red"}
_BARS = "▁▂▃▄▅▆▇█"
_ANSWERS = 6
# Characters of an error in the table; whole, it is told below.
_CELL = 40


class Terminal:
    """Prints the events of a run. Use as a context manager: the progress bars end with it."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.console = Console(file=file or sys.stderr, highlight=False, soft_wrap=True)
        self._width = 8
        self._said: dict[str, float] = {}
        self._stages: dict[str, str] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
            # Twice a second is smooth enough, and leaves the cores to the work.
            self._progress = Progress(
                *columns, TimeElapsedColumn(), console=self.console, transient=True, refresh_per_second=2
            )

    def __enter__(self) -> Terminal:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()

    def widen(self, names: Sequence[str]) -> None:
        """Leave room for the longest node's name."""
        self._width = max(self._width, *map(len, names)) if names else self._width

    def listen(self, node: str, event: Mapping[str, Any]) -> None:
        """Print one event of one node."""
        kind = event["event"]
        if kind == "progress":
            self._tick(node, event)
            return
        if kind == "start":
            self._stages[node] = event["stage"]
            self._line(node, "building", _together(event["why"]))
            if self._progress:
                self._bars[node] = self._progress.add_task(node, total=None, said="")
        elif kind == "log":
            # The builder's own first lines repeat why, for the log that is kept.
            if not event["message"].startswith(f"building {self._stages.get(node, ' ')}: "):
                warning = event.get("level") == "warning"
                self._line(node, "", event["message"], "yellow" if warning else "")
        elif kind == "cached":
            self._line(node, "cached", event["ref"], "dim")
        elif kind == "done":
            self._line(node, event["status"], duration(event["seconds"]), _COLOURS[event["status"]])
        elif kind in ("failed", "interrupted"):
            # Whole, it is told once, at the end.
            self._line(node, kind, _short(event["message"].partition("\n")[0]), "red")
        elif kind == "skipped":
            self._line(node, "skipped", "", "dim")
        if kind in ("done", "failed", "interrupted") and self._progress and node in self._bars:
            self._progress.remove_task(self._bars.pop(node))

    def say(self, message: str, style: str = "") -> None:
        """Print a line that belongs to no node."""
        self.console.print(Text(message, style=style))

    def tell(self, failed: Iterable[Outcome]) -> None:
        """Print what went wrong, whole."""
        for one in failed:
            self.say(f"{one.node} {one.status}: {one.error}", "red")

    def _line(self, node: str, what: str, message: str, style: str = "") -> None:
        clock = time.strftime("%H:%M:%S")
        head = f"{clock}  {node:<{self._width}}  "
        text = f"{what} {message}".strip() if what else message
        self.console.print(Text(head, style="dim") + Text(text, style=style))

    def _tick(self, node: str, event: Mapping[str, Any]) -> None:
        figures = {key: value for key, value in event.items() if key not in ("event", "done", "total")}
        said = "  ".join(f"{label(key)} {number(value)}" for key, value in figures.items())
        if self._progress and node in self._bars:
            self._progress.update(
                self._bars[node], completed=event["done"], total=event["total"], said=escape(said)
            )
            return
        now = time.monotonic()
        if now - self._said.get(node, 0.0) >= _EVERY:
            self._said[node] = now
            share = 100 * event["done"] / event["total"] if event["total"] else 0.0
            self._line(node, f"{share:3.0f}%", said)


def print_report(report: Report, console: Console | None = None) -> None:
    """The summary at the end of a run: stages, gates, curves, answers, lineage, and where the page is."""
    console = console or Console(highlight=False)
    table = Table(title=None, box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("node", "", "time", "figures"):
        table.add_column(name, justify="right" if name == "time" else "left", overflow="fold")
    for row in report.rows:
        figures = "  ".join(f"{label(name)} {number(value)}" for name, value in row.figures.items())
        style = _COLOURS.get(row.status, "yellow")
        table.add_row(
            Text(row.node),
            Text(row.status, style=style),
            duration(row.seconds),
            Text(figures or _short(row.error.partition("\n")[0], _CELL)),
        )
    console.print(table)
    for gate in report.gates:
        value = "no figure" if gate["value"] is None else number(gate["value"])
        tail = f"  {gate['problem']}" if gate["problem"] else ""
        mark = Text("holds ", style="green") if gate["holds"] else Text("FAILS ", style="red")
        console.print(mark + Text(f"{gate['name']}: {value} ({gate['bound']}){tail}"))
    for paragraph in report.gains:
        console.print(Text(f"\n{paragraph}\n"))
    for curve in report.curves:
        console.print(Text(_curve(curve)))
    # Of the last evaluation: what the finished model answers, not what the base model did.
    last = [sample for sample in report.samples if sample.node == report.samples[-1].node]
    for sample in last[:_ANSWERS]:
        mark = Text("right ", style="green") if sample.correct else Text("wrong ", style="red")
        asked = " (asked to think)" if sample.system else ""
        told = f"{sample.node}{asked}: {_short(sample.prompt)} -> {_short(sample.answer)}"
        console.print(mark + Text(told))
    if report.tree:
        console.print(Text("\n" + report.tree.rstrip()))
    if report.promotion:
        style = "red" if report.promotion.startswith("not ") else "green"
        console.print(Text(f"\n{report.promotion}", style=style))
    if report.unwritten:
        console.print(Text(f"\n{report.unwritten}", style="yellow"), soft_wrap=True)
    else:
        console.print(Text(f"\nreport  {report.page}"), soft_wrap=True)


def _curve(curve: Curve) -> str:
    first, last = curve.points[0][1], curve.points[-1][1]
    drawn = sparkline([y for _, y in curve.points], 32)
    return f"{curve.node} {label(curve.name)}: {number(float(first))} {drawn} {number(float(last))}"


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in one line of block characters: the mean of each of `width` equal parts."""
    values = [value for value in values if value == value]
    if not values:
        return ""
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _together(reasons: Sequence[str]) -> str:
    """Reasons in one line; what they all end with (the artifact they compare with) is said once."""
    tails = {reason.partition(" (nearest earlier: ")[2] for reason in reasons}
    if len(tails) == 1 and tails != {""}:
        return f"{'; '.join(reason.partition(' (nearest')[0] for reason in reasons)} (unlike {tails.pop()}"
    return "; ".join(reasons)


def _short(text: str, length: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
