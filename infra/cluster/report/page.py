"""A plan as one HTML page that needs nothing else: no script, no style sheet, no font, no picture from
elsewhere. All text is escaped; drawings are the planner's own SVG."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from infra.cluster.report.chapter import LEGEND, Chapter, Table, cell, figures

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --dim: #57606a; --good: #1a7f37; --bad: #b3261e;
--miss: #9a6700 }
@media (prefers-color-scheme: dark) { :root { --line: #30363d; --dim: #8d96a0; --good: #3fb950;
--bad: #ff7b72; --miss: #d29922 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.4rem }
h3 { font-size: 1rem; margin-bottom: .3rem } p { max-width: 52rem } .dim { color: var(--dim) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0; font-size: .9em }
table { border-collapse: collapse } th, td { text-align: left; padding: .25rem 1.2rem .25rem 0;
border-bottom: 1px solid var(--line); vertical-align: top } th { font-size: .85em; color: var(--dim) }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3.5rem; align-items: flex-start }
.tables > div { max-width: 100% } .scroll { overflow-x: auto }
.n { text-align: right; font-variant-numeric: tabular-nums }
td.n { white-space: nowrap } .good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
.miss { color: var(--miss); font-weight: 600 }
.drawing svg { width: 100%; height: auto; min-width: 60rem }
.drawing { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: .5rem;
margin-top: 1rem }
"""


_MARKS = {"holds": "good", "FAILS": "bad", "misses": "miss"}


def to_page(title: str, subtitle: str, chapters: Iterable[Chapter]) -> str:
    """The whole page as text."""
    told = list(chapters)
    links = "".join(
        f'<a href="#c{number}">{escape(chapter.title)}</a>' for number, chapter in enumerate(told)
    )
    body = "\n".join(_chapter(number, chapter) for number, chapter in enumerate(told))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing here runs or loads anything; the policy makes sure of it.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)} - Headwater</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="dim">{escape(subtitle)}</p>\n'
        f'<p class="dim">{escape(LEGEND)}</p>\n<nav>{links}</nav>\n'
        f"{body}\n</body>\n</html>\n"
    )


def _chapter(number: int, chapter: Chapter) -> str:
    parts = [f'<section id="c{number}">\n<h2>{escape(chapter.title)}</h2>']
    tables = ([figures(chapter.rows)] if chapter.rows else []) + list(chapter.tables)
    if tables:
        parts.append(
            '<div class="tables">' + "\n".join(f"<div>{_table(table)}</div>" for table in tables) + "</div>"
        )
    if chapter.drawing:
        # Inside of HTML an SVG needs no name of its vocabulary, which looks like an address.
        drawing = chapter.drawing.replace(' xmlns="http://www.w3.org/2000/svg"', "")
        parts.append(f'<div class="drawing">{drawing}</div>')
    parts += [f"<p>{escape(note)}</p>" for note in chapter.notes]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    kept = [
        index for index in range(len(table.head)) if any(row[index] not in (None, "") for row in table.rows)
    ]
    numbers = {
        index
        for index in kept
        if all(not isinstance(row[index], str) for row in table.rows if row[index] is not None)
    }
    head = "".join(
        f'<th class="n">{escape(table.head[i])}</th>' if i in numbers else f"<th>{escape(table.head[i])}</th>"
        for i in kept
    )
    lines = []
    for row in table.rows:
        cells = []
        for index in kept:
            text = cell(row[index])
            style = "n" if index in numbers else _MARKS.get(text, "")
            cells.append(f'<td class="{style}">{escape(text)}</td>' if style else f"<td>{escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<h3>{escape(table.title)}</h3>\n" if table.title else ""
    return f'{title}<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"
