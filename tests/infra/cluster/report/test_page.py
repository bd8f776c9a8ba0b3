"""The page: one file that needs nothing else, whole, and safe whatever a preset is called."""

import re
from html.parser import HTMLParser

import pytest

from infra.cluster.report.chapter import Chapter, Table, beside
from infra.cluster.report.page import to_page
from tests.infra.cluster.report import v3

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "<script>alert('x')</script> \"quoted\" & <img src=http://evil.example/x>"


class Reader(HTMLParser):
    """Tags, attributes and text; every tag must be closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    asked = v3.plan().request
    return to_page(asked.title, asked.subtitle, v3.chapters())


def self_contained(page: str) -> None:
    read = Reader(page)
    assert not read.open
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}
    for _, attributes in read.tags:
        assert not {"src", "srcset", "style", "background", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?://", page)
    assert not re.search(r"@import|url\(", page)


def test_the_page_needs_nothing_else(page):
    self_contained(page)
    assert page.startswith("<!doctype html>")
    assert len(page.encode()) < 1_500_000


def test_the_policy_allows_nothing_but_its_own_styles(page):
    policies = [tag for name, tag in Reader(page).tags if name == "meta" and "http-equiv" in tag]
    assert policies == [
        {
            "http-equiv": "Content-Security-Policy",
            "content": "default-src 'none'; style-src 'unsafe-inline'",
        }
    ]


def test_every_chapter_is_on_the_page_and_linked(page):
    read = Reader(page)
    sections = [tag["id"] for name, tag in read.tags if name == "section"]
    links = [tag["href"] for name, tag in read.tags if name == "a"]
    assert links == [f"#{section}" for section in sections]
    assert len(sections) == len(v3.chapters()) > 8
    for chapter in v3.chapters():
        # In the list of links and over the chapter.
        assert read.texts.count(chapter.title) >= 2
        for table in chapter.tables:
            assert not table.title or table.title in read.texts
        for row in chapter.rows:
            assert row.name in read.texts
        for note in chapter.notes:
            assert note in read.texts


def test_the_timeline_is_drawn(page):
    names = [name for name, _ in Reader(page).tags]
    assert names.count("svg") == 1


def test_hostile_text_stays_text():
    chapter = Chapter(
        HOSTILE,
        (beside(HOSTILE, HOSTILE, 1.0, 2.0),),
        (Table(HOSTILE, (HOSTILE, "b"), ((HOSTILE, 1),)),),
        (HOSTILE,),
    )
    page = to_page(HOSTILE, HOSTILE, [chapter])
    assert "<script" not in page
    read = Reader(page)
    assert not read.open
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "img"})
    # Title, headline, subtitle, link, chapter, figure, unit, table, head, cell and note.
    assert sum(text.startswith(HOSTILE) for text in read.texts) == 11


def test_figures_that_fail_stand_out():
    rows = (beside("x", "", 2, 1, 0.0, must=True), beside("y", "", 1, 1, 0.0, must=True))
    page = to_page("p", "s", [Chapter("c", rows)])
    assert '<td class="bad">FAILS</td>' in page
    assert '<td class="good">holds</td>' in page
