"""Lineage back and forward, in each form."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser

import pytest

from infra.artifact import Artifact
from infra.build import build
from infra.config import StageConfig
from infra.lineage import Edge, Graph, Node, back, forward, to_json, to_mermaid, to_text
from infra.lineage_page import to_html
from infra.stage import Stage, StageContext
from infra.store import Store
from tests.infra.toys import TRAIN, WORDS, TrainConfig, WordsConfig


@pytest.fixture
def chain(store: Store, words: Artifact) -> list[Artifact]:
    more = build(store, WORDS, WordsConfig(words=("x",)), {}).artifact
    base = build(store, TRAIN, TrainConfig(steps=1), {"words": [words, more]}).artifact
    final = build(store, TRAIN, TrainConfig(), {"words": [words], "base": [base]}).artifact
    store.promote(final.ref, "chat")
    return [words, more, base, final]


def test_back_and_forward(store: Store, chain: list[Artifact]) -> None:
    words, more, base, final = chain
    graph = back(store, final)
    assert set(graph.nodes) == {one.ref for one in chain}
    assert set(graph.edges) == {
        Edge(words.ref, final.ref, "words"),
        Edge(base.ref, final.ref, "base"),
        Edge(words.ref, base.ref, "words"),
        Edge(more.ref, base.ref, "words"),
    }
    assert set(back(store, words).nodes) == {words.ref}
    assert set(forward(store, words).nodes) == {words.ref, base.ref, final.ref}
    assert set(forward(store, more).nodes) == {more.ref, base.ref, final.ref}
    assert set(forward(store, final).nodes) == {final.ref}


def test_json(store: Store, chain: list[Artifact]) -> None:
    words, _, base, final = chain
    found = to_json(back(store, final))
    assert (found["root"], found["direction"]) == (final.ref, "back")
    first = found["nodes"][0]
    assert (first["ref"], first["stage"], first["id"], first["names"]) == (
        final.ref,
        "train",
        final.id,
        ["chat"],
    )
    assert (first["digest"], first["metrics"]) == (final.digest, dict(final.metrics))
    assert first["created"] == final.record.finished
    assert {"from": base.ref, "to": final.ref, "role": "base"} in found["edges"]
    assert [node["missing"] for node in found["nodes"]] == [False] * 4
    shutil.rmtree(base.path)
    found = to_json(back(store, final))
    gone = {node["ref"]: node for node in found["nodes"]}[base.ref]
    assert (gone["missing"], gone["digest"]) == (True, base.digest)
    assert {node["ref"] for node in found["nodes"]} == {final.ref, words.ref, base.ref}


def test_text_opens_each_part_once(store: Store, chain: list[Artifact]) -> None:
    words, more, base, final = chain
    lines = to_text(back(store, final)).splitlines()
    assert [re.sub(r"  \d{4}-.*", "", line) for line in lines] == [
        f"{final.ref}  [chat]",
        f"├─ words: {words.ref}",
        f"└─ base: {base.ref}",
        f"   ├─ words: {words.ref}",
        f"   └─ words: {more.ref}",
    ]
    last = build(store, TRAIN, TrainConfig(seed=9), {"words": [words], "base": [base]}).artifact
    downstream = to_text(forward(store, more))
    assert last.ref in downstream
    diamond = build(store, TRAIN, TrainConfig(seed=10), {"words": [words], "base": [final]}).artifact
    assert to_text(back(store, diamond)).count("(above)") == 0
    shutil.rmtree(more.path)
    assert f"{more.ref}  (no longer in the store)" in to_text(back(store, final))


def test_what_was_opened_above_is_not_opened_again() -> None:
    nodes = {ref: Node(ref, "", None) for ref in ("a@1", "b@1", "c@1", "d@1")}
    edges = (
        Edge("b@1", "a@1", "x"),
        Edge("c@1", "a@1", "y"),
        Edge("c@1", "b@1", "z"),
        Edge("d@1", "c@1", "w"),
    )
    text = to_text(Graph("a@1", False, nodes, edges))
    assert text.count("c@1") == 2
    assert text.count("d@1") == 1
    assert "y: c@1  (no longer in the store) (above)" in text


def test_mermaid(store: Store, chain: list[Artifact]) -> None:
    words, _, _, final = chain
    text = to_mermaid(back(store, final), links={words.ref: 'http://h/?a="b"', "gone@1": "x"})
    lines = text.splitlines()
    assert lines[0] == "flowchart LR"
    assert f'  n0["train<br/>{final.id}<br/>chat"]' in lines
    assert '  n1 -->|"words"| n0' in lines
    assert '  click n1 "http://h/?a=#34;b#34;"' in lines
    assert sum(line.startswith("  click") for line in lines) == 1


class Page(HTMLParser):
    """Collects the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_escapes_whatever_a_record_holds(store: Store) -> None:
    nasty = "<script>alert('x')</script>\"><img src=x onerror=y>"

    def run(config: StageConfig, context: StageContext) -> None:
        context.metric(nasty, nasty)
        context.write_json("x.json", 1)

    artifact = build(store, Stage("nasty", 1, StageConfig, run), StageConfig(), {}).artifact
    graph = back(store, artifact)
    raw = to_html(graph, title=nasty)
    page = Page()
    page.feed(raw)
    assert not {"script", "img"} & set(page.tags)
    assert not {name for name in page.attributes if name.startswith("on")}
    assert nasty in page.text
    node = Node(f"a@{nasty}", nasty, None, (nasty,))
    hostile = Graph(node.ref, False, {node.ref: node}, (Edge(node.ref, node.ref, nasty),))
    page = Page()
    page.feed(to_html(hostile))
    assert not {"script", "img"} & set(page.tags)
    assert "<script" not in to_mermaid(hostile)
    assert '"><' not in to_mermaid(hostile)


def test_html_needs_nothing_else(store: Store, chain: list[Artifact]) -> None:
    raw = to_html(back(store, chain[-1]))
    assert "http" not in raw
    assert "<link" not in raw
    assert raw.count("<rect ") == 4
    assert raw.count("<path ") == 4
    for artifact in chain:
        assert artifact.ref in raw
    # Readers stand to the right of what they read.
    at = {
        ref: float(x)
        for ref, x in re.findall(r'<title>([a-z]+@[0-9a-f]+)</title><rect class="\w*" x="([\d.]+)"', raw)
    }
    assert at[chain[0].ref] < at[chain[2].ref] < at[chain[3].ref]
    assert to_html(forward(store, chain[0])).count("<rect ") == 3
