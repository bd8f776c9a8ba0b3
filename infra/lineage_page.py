"""A lineage graph as one HTML page that needs nothing else: no script, no style sheet, no font from
elsewhere.
"""

from __future__ import annotations

from html import escape

from infra.lineage import Graph, Node

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 190, 52, 70, 22, 20
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1b1f24; background: #fff }
h1 { font-size: 1.3rem } code, td.mono { font-family: ui-monospace, monospace; font-size: .85em }
.graph { overflow-x: auto; border: 1px solid #d0d7de; border-radius: 6px }
rect { fill: #f6f8fa; stroke: #57606a }
rect.root { stroke: #0969da; stroke-width: 3 } rect.gone { stroke-dasharray: 5 }
text { fill: #1b1f24; font-size: 13px } text.id, text.role { fill: #57606a; font-size: 11px }
path { fill: none; stroke: #8c959f; stroke-width: 1.5 }
table { border-collapse: collapse; margin-top: 1.5rem } th, td { text-align: left; padding: .3rem .8rem;
border-bottom: 1px solid #d0d7de; vertical-align: top } .scroll { overflow-x: auto }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 } rect { fill: #161b22 }
text { fill: #e6edf3 } text.id, text.role { fill: #8d96a0 } .graph, th, td { border-color: #30363d } }
"""


def to_html(graph: Graph, title: str = "") -> str:
    """The graph as a drawing and a table. Everything that comes from records is escaped."""
    heading = escape(title or ("Built from " if graph.forward else "Lineage of ") + graph.root)
    rows = "\n".join(_row(node) for node in graph.nodes.values())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n"
        f'<div class="graph">\n{_drawing(graph)}\n</div>\n<div class="scroll"><table>\n'
        "<tr><th>artifact</th><th>made</th><th>seconds</th><th>metrics</th><th>digest</th></tr>\n"
        f"{rows}\n</table></div>\n</body>\n</html>\n"
    )


def _row(node: Node) -> str:
    name = f"<code>{escape(node.ref)}</code>" + (f"<br>{escape(', '.join(node.names))}" if node.names else "")
    if node.record is None:
        return f'<tr><td>{name}</td><td colspan="4">no longer in the store</td></tr>'
    metrics = "<br>".join(
        f"{escape(key)}: {escape(_figure(value))}" for key, value in node.record.metrics.items()
    )
    return (
        f"<tr><td>{name}</td><td>{escape(node.record.finished)}</td>"
        f"<td>{node.record.timings.get('seconds', 0.0):.1f}</td><td>{metrics}</td>"
        f'<td class="mono">{escape(node.digest[:16])}</td></tr>'
    )


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(graph: Graph) -> list[list[str]]:
    """References by column: each one column right of the rightmost of what it read, ordered to keep lines
    short.
    """
    column = dict.fromkeys(graph.nodes, 0)
    for _ in graph.nodes:
        moved = False
        for edge in graph.edges:
            if column[edge.reader] <= column[edge.source]:
                column[edge.reader] = column[edge.source] + 1
                moved = True
        if not moved:
            break
    columns: list[list[str]] = [[] for _ in range(max(column.values()) + 1)]
    for ref in graph.nodes:
        columns[column[ref]].append(ref)
    place = {ref: float(i) for refs in columns for i, ref in enumerate(refs)}
    for refs in columns[1:]:
        sources = {ref: [place[edge.source] for edge in graph.edges if edge.reader == ref] for ref in refs}
        refs.sort(key=lambda ref, sources=sources: (sum(sources[ref]) / max(len(sources[ref]), 1), ref))
        place |= {ref: float(i) for i, ref in enumerate(refs)}
    return columns


def _drawing(graph: Graph) -> str:
    columns = _columns(graph)
    tallest = max(len(refs) for refs in columns)
    at = {}
    for x, refs in enumerate(columns):
        top = _MARGIN + (tallest - len(refs)) * (_HEIGHT + _GAP_Y) / 2
        for y, ref in enumerate(refs):
            at[ref] = (_MARGIN + x * (_WIDTH + _GAP_X), top + y * (_HEIGHT + _GAP_Y))
    width = 2 * _MARGIN + len(columns) * (_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _MARGIN + tallest * (_HEIGHT + _GAP_Y) - _GAP_Y
    parts = [f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">']
    for edge in graph.edges:
        x1, y1 = at[edge.source][0] + _WIDTH, at[edge.source][1] + _HEIGHT / 2
        x2, y2 = at[edge.reader][0], at[edge.reader][1] + _HEIGHT / 2
        middle = (x1 + x2) / 2
        parts.append(
            f'<path d="M{x1:g},{y1:g} C{middle:g},{y1:g} {middle:g},{y2:g} {x2:g},{y2:g}">'
            f"<title>{escape(edge.role)}</title></path>"
        )
    for ref, (x, y) in at.items():
        node = graph.nodes[ref]
        kind = "root" if ref == graph.root else "gone" if node.record is None else ""
        label = node.stage + (f" [{', '.join(node.names)}]" if node.names else "")
        parts.append(
            f'<g><title>{escape(ref)}</title><rect class="{kind}" x="{x:g}" y="{y:g}" width="{_WIDTH}" '
            f'height="{_HEIGHT}" rx="6"/><text x="{x + 12:g}" y="{y + 22:g}">{escape(label[:26])}</text>'
            f'<text class="id" x="{x + 12:g}" y="{y + 40:g}">{escape(node.id[:26])}</text></g>'
        )
    parts.append("</svg>")
    return "\n".join(parts)
