"""report.html: one page that needs nothing else, drawn from a `Report`. All text from outside is escaped."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from flows.report import Report, Row, Sample
from infra.files import atomic_write_text

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --dim: #57606a; --good: #1a7f37; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --line: #30363d; --dim: #8d96a0; --good: #3fb950; --bad:
#ff7b72 } } body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0
1rem } h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem } p.note,
td.dim, .dim { color: var(--dim) } code, pre, td.mono { font-family: ui-monospace, monospace; font-size:
.85em } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 } .tree { white-space: pre;
overflow-x: auto } table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding:
.35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top } .scroll { overflow-x:
auto } td.n { text-align: right } .good { color: var(--good) } .bad { color: var(--bad) } details { margin:
.4rem 0 } summary { cursor: pointer } .plots { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin:
0; max-width: 100% } img { max-width: 100%; background: #fff; border: 1px solid var(--line) } figcaption {
color: var(--dim); font-size: .85em }
"""


def write(report: Report) -> Report:
    """Write the page. Where that cannot be done the report says why: the run itself is done either way."""
    try:
        atomic_write_text(report.page, render(report), points=None)
    except OSError as error:
        why = (
            f"{report.page} could not be written ({error.strerror or error}): make room or make its folder "
            f"writable, then `headwater report {report.run}` writes it"
        )
        return dataclasses.replace(report, unwritten=why)
    return report


def render(report: Report) -> str:
    """The whole page as text."""
    parts = [
        f"<h1>{escape(report.run)}</h1>",
        f'<p class="note">{escape(report.description)}<br>preset {escape(report.preset)}, '
        f"{len(report.rows)} nodes, {duration(report.seconds)}, "
        f"{escape(report.made[:19].replace('T', ' '))} UTC</p>",
        _section("Claims", _gates(report)),
        _section(
            "What reinforcement learning brought",
            "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in report.gains),
        ),
        _section("Stages", _stages(report.rows)),
        _section("Curves", _plots(report.rows)),
        _section("Sample answers", _samples(report.samples)),
        _section("Lineage", f'<pre class="tree">{escape(report.tree)}</pre>' if report.tree else ""),
        _section("Records", "".join(_record(row) for row in report.rows)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing here runs or loads anything; the policy makes sure of it, whatever a sample may contain.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(report.run)} - Headwater</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table>\n<tr>{cells}</tr>\n{"".join(rows)}</table></div>'


def _gates(report: Report) -> str:
    rows = [
        f"<tr><td>{_mark(gate['holds'])}</td><td>{escape(str(gate['name']))}</td>"
        f'<td class="n">{escape(number(gate["value"]) if gate["value"] is not None else "none")}</td>'
        f'<td>{escape(str(gate["bound"]))}</td><td class="mono">{escape(str(gate["formula"]))}</td>'
        f'<td class="bad">{escape(str(gate["problem"]))}</td></tr>\n'
        for gate in report.gates
    ]
    table = _table(("", "claim", "measured", "asked", "figure", ""), rows) if rows else ""
    return table + (f"<p>{escape(report.promotion)}</p>" if report.promotion else "")


def _mark(good: bool, yes: str = "holds", no: str = "fails") -> str:
    return f'<span class="{"good" if good else "bad"}">{yes if good else no}</span>'


def _stages(rows: Iterable[Row]) -> str:
    return _table(
        ("node", "stage", "", "time", "figures", "artifact"),
        [
            f"<tr><td>{escape(row.node)}</td><td>{escape(row.stage)}</td>"
            f'<td class="{"dim" if row.artifact or row.earlier else "bad"}">{escape(row.status)}</td>'
            f'<td class="n">{duration(row.seconds)}</td>'
            f"<td>{_figures(row.figures)}{_error(row)}</td>"
            f'<td class="mono dim">{escape(row.artifact.ref if row.artifact else "")}</td></tr>\n'
            for row in rows
        ],
    )


def _error(row: Row) -> str:
    return f'<pre class="bad">{escape(row.error)}</pre>' if row.error and row.artifact is None else ""


def _figures(figures: Mapping[str, Any]) -> str:
    return "<br>".join(
        f'<span class="dim">{escape(label(name))}</span> {escape(number(value))}'
        for name, value in figures.items()
    )


def _plots(rows: Iterable[Row]) -> str:
    pictures = [
        f'<figure><img alt="{escape(row.node)} {escape(name)}" '
        f'src="data:image/png;base64,{_base64(row, name)}">'
        f"<figcaption>{escape(row.node)}: {escape(name[6:-4])}</figcaption></figure>\n"
        for row in rows
        if row.artifact
        for name in row.artifact.names("plots/*.png")
        if (row.artifact.path / name).is_file()
    ]
    return f'<div class="plots">\n{"".join(pictures)}</div>' if pictures else ""


def _base64(row: Row, name: str) -> str:
    return base64.b64encode((row.artifact.path / name).read_bytes()).decode() if row.artifact else ""


def _samples(samples: Iterable[Sample]) -> str:
    rows = [
        f"<tr><td>{escape(one.node)}</td><td><pre>{escape(one.prompt)}</pre>{_system(one)}</td>"
        f"<td><pre>{escape(one.answer)}</pre></td><td><pre>{escape(one.expected)}</pre></td>"
        f"<td>{_mark(one.correct, 'right', 'wrong')}</td></tr>\n"
        for one in samples
    ]
    return _table(("node", "prompt", "answer", "expected", ""), rows) if rows else ""


def _system(sample: Sample) -> str:
    return f'<span class="dim">system: {escape(sample.system)}</span>' if sample.system else ""


def _record(row: Row) -> str:
    if row.artifact is None:
        return ""
    record = row.artifact.record
    rows = [("metric", name, number(value)) for name, value in record.metrics.items()]
    rows += [("timing", name, number(value)) for name, value in record.timings.items()]
    rows += [(f"input {one.role}", one.ref, one.digest[:16]) for one in record.inputs]
    rows += [
        ("build", name, value)
        for name, value in (
            ("finished", record.finished[:19].replace("T", " ")),
            ("digest", record.digest[:16]),
            ("commit", str(record.code.get("commit", ""))[:12]),
            ("tries", str(len(record.tries))),
        )
    ]
    table = "".join(
        f'<tr><td class="dim">{escape(kind)}</td><td>{escape(name)}</td>'
        f'<td class="mono">{escape(value)}</td></tr>\n'
        for kind, name, value in rows
    )
    config = escape(json.dumps(record.config, indent=2, sort_keys=True, ensure_ascii=False))
    return (
        f"<details><summary>{escape(row.node)} <code>{escape(row.artifact.ref)}</code></summary>\n"
        f"<table>{table}</table>\n<pre>{config}</pre></details>\n"
    )


def label(name: str) -> str:
    """A metric's name for people."""
    return name.replace("_", " ")


def number(value: Any) -> str:
    """A figure in few digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
