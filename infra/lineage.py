"""The graph of records: back from an artifact to the sources it came from, forward to what was built from
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.artifact import Artifact
from infra.errors import StoreError
from infra.index import readers
from infra.record import Record

if TYPE_CHECKING:
    from infra.store import Store


@dataclass(frozen=True)
class Node:
    """One artifact of a graph. record is None when it is no longer in the store or cannot be read."""

    ref: str
    digest: str
    record: Record | None
    names: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        return self.ref.partition("@")[0]

    @property
    def id(self) -> str:
        return self.ref.partition("@")[2]


@dataclass(frozen=True)
class Edge:
    """`reader` was built from `source`, which it read in `role`."""

    source: str
    reader: str
    role: str


@dataclass(frozen=True)
class Graph:
    """Artifacts reached from `root`; `forward` says which way. Nodes in the order they were reached."""

    root: str
    forward: bool
    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    def steps(self, ref: str) -> list[tuple[str, str]]:
        """`(role, reference)` one step away from `ref`, away from the root."""
        if self.forward:
            return [(edge.role, edge.reader) for edge in self.edges if edge.source == ref]
        return [(edge.role, edge.source) for edge in self.edges if edge.reader == ref]


def back(store: Store, artifact: Artifact) -> Graph:
    """Everything an artifact was built from, from the records alone. A part that is gone is a node without a
    record.
    """
    names = _names(store)
    nodes = {artifact.ref: Node(artifact.ref, artifact.digest, artifact.record, names.get(artifact.ref, ()))}
    edges = []
    todo = [artifact.record]
    while todo:
        record = todo.pop(0)
        for pin in record.inputs:
            edges.append(Edge(pin.ref, record.ref, pin.role))
            if pin.ref in nodes:
                continue
            found = _record(store, pin.ref)
            nodes[pin.ref] = Node(pin.ref, pin.digest, found, names.get(pin.ref, ()))
            if found is not None:
                todo.append(found)
    return Graph(artifact.ref, False, nodes, tuple(dict.fromkeys(edges)))


def forward(store: Store, artifact: Artifact) -> Graph:
    """Everything that was built from an artifact, directly or not."""
    names = _names(store)
    read_by = readers(store)
    nodes = {artifact.ref: Node(artifact.ref, artifact.digest, artifact.record, names.get(artifact.ref, ()))}
    edges = []
    todo = [artifact.ref]
    while todo:
        ref = todo.pop(0)
        for role, reader in read_by.get(ref, ()):
            edges.append(Edge(ref, reader, role))
            if reader not in nodes:
                record = _record(store, reader)
                nodes[reader] = Node(reader, record.digest if record else "", record, names.get(reader, ()))
                todo.append(reader)
    return Graph(artifact.ref, True, nodes, tuple(dict.fromkeys(edges)))


def _record(store: Store, ref: str) -> Record | None:
    stage, _, id = ref.partition("@")
    try:
        return store.artifact(stage, id).record
    except StoreError:
        return None


def _names(store: Store) -> dict[str, tuple[str, ...]]:
    """Promoted names by the reference they point at; a file that cannot be read names nothing."""
    found: dict[str, tuple[str, ...]] = {}
    for name, document in store.names.all([]).items():
        found[document["artifact"]] = (*found.get(document["artifact"], ()), name)
    return found


def to_json(graph: Graph) -> dict[str, Any]:
    """`{root, direction, nodes: [...], edges: [{from, to, role}]}`; an edge points from what was read to its
    reader.
    """
    return {
        "root": graph.root,
        "direction": "forward" if graph.forward else "back",
        "nodes": [_node_json(node) for node in graph.nodes.values()],
        "edges": [{"from": edge.source, "to": edge.reader, "role": edge.role} for edge in graph.edges],
    }


def _node_json(node: Node) -> dict[str, Any]:
    record = node.record
    return {
        "ref": node.ref,
        "stage": node.stage,
        "id": node.id,
        "digest": node.digest,
        "names": list(node.names),
        "missing": record is None,
        "created": record.finished if record else "",
        "metrics": dict(record.metrics) if record else {},
        "seconds": record.timings.get("seconds", 0.0) if record else 0.0,
        "bytes": record.size if record else 0,
        "sources": dict(record.sources) if record else {},
    }


def to_text(graph: Graph) -> str:
    """The graph as a tree of lines; what was shown already is named but not opened again."""
    lines: list[str] = []
    shown: set[str] = set()

    def walk(ref: str, role: str, first: str, rest: str) -> None:
        again = ref in shown and bool(graph.steps(ref))
        lines.append(
            first + (f"{role}: " if role else "") + _label(graph.nodes[ref]) + (" (above)" if again else "")
        )
        if again:
            return
        shown.add(ref)
        steps = graph.steps(ref)
        for i, (step_role, step) in enumerate(steps):
            last = i == len(steps) - 1
            walk(step, step_role, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    walk(graph.root, "", "", "")
    return "\n".join(lines) + "\n"


def _label(node: Node) -> str:
    tail = f"  [{', '.join(node.names)}]" if node.names else ""
    if node.record is None:
        return f"{node.ref}{tail}  (no longer in the store)"
    sources = node.record.sources
    scanned = f", {sources['files']:,} source files" if sources else ""
    return f"{node.ref}{tail}  {node.record.finished[:16].replace('T', ' ')}{scanned}"


def to_mermaid(graph: Graph, links: Mapping[str, str] | None = None) -> str:
    """The graph as a mermaid flowchart, arrows from what was read to its reader.

    links: reference -> address, for nodes that can be clicked.
    """
    ids = {ref: f"n{i}" for i, ref in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    for ref, node in graph.nodes.items():
        parts = [node.stage, node.id, *node.names] + (["(gone)"] if node.record is None else [])
        lines.append(f'  {ids[ref]}["{"<br/>".join(_mermaid(part) for part in parts)}"]')
    for edge in graph.edges:
        lines.append(f'  {ids[edge.source]} -->|"{_mermaid(edge.role)}"| {ids[edge.reader]}')
    for ref, address in (links or {}).items():
        if ref in ids:
            lines.append(f'  click {ids[ref]} "{_mermaid(address)}"')
    lines.append(f"  style {ids[graph.root]} stroke-width:3px")
    return "\n".join(lines) + "\n"


def _mermaid(text: str) -> str:
    """Text inside mermaid quotes: anything but plain characters as a numeric entity."""
    safe = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -_./:()=?&%")
    return "".join(one if one in safe else f"#{ord(one)};" for one in text)
