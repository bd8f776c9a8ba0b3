import os
from pathlib import Path

import pytest

from data.choose import choose
from data.documents import iter_documents
from data.sources.base import Reading
from data.sources.resolve import resolve
from data.sources.words import absolute
from flows.stages.ingest import STAGE, IngestConfig, scan
from infra.build import build
from infra.config import split
from infra.store import open_store


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"words of {name}", "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_become_absolute_and_other_words_stay(here: Path):
    assert absolute("one") == f"{here}/one"
    assert absolute("builtin, two ,datasets:one") == f"builtin,{here}/two,datasets:{here}/one"
    for words in ("builtin", "stdlib,sysdocs", "datasets:owner/name", "no/such", "~nosuchuser/x", "x" * 5000):
        assert absolute(words) == words
    (here / "a,b.txt").write_text("x", "utf-8")
    assert absolute("a,b.txt") == f"{here}/a,b.txt"
    (here / "stdlib").mkdir()
    assert absolute("one,stdlib") == f"{here}/one,stdlib"


def test_a_config_works_from_any_folder(here: Path):
    config = IngestConfig(sources="one")
    found = scan(config)
    os.chdir("/")
    assert scan(config) == found


def test_the_place_of_the_sources_is_recorded_and_no_part_of_the_fingerprint(here: Path):
    store = open_store(here / "home")
    build(store, STAGE, IngestConfig(sources="one"), {})
    identity, aside = split(IngestConfig(sources="one"))
    assert "sources" not in identity
    assert aside["sources"] == f"{here}/one"
    (here / "moved").mkdir()
    (here / "one").rename(here / "moved" / "one")
    assert build(store, STAGE, IngestConfig(sources="moved/one"), {}).status == "cached"
    assert build(store, STAGE, IngestConfig(sources="two"), {}).status == "built"


def test_the_order_of_the_sources_makes_no_difference(here: Path):
    store = open_store(here / "home")
    first = build(store, STAGE, IngestConfig(sources="one,two"), {})
    again = build(store, STAGE, IngestConfig(sources="two,one"), {}, force=True)
    assert again.artifact.digest == first.artifact.digest
    texts = [one.text for one in iter_documents(first.artifact.folder("documents"))]
    assert sorted(texts) == ["words of one", "words of two"]


def test_two_folders_of_one_name_are_told_apart_by_their_content(here: Path):
    (here / "other").mkdir()
    (here / "one").rename(here / "other" / "two")
    manifests = [
        choose(resolve(words), 0, Reading()).manifest() for words in ("two,other/two", "other/two,two")
    ]
    assert manifests[0] != manifests[1]
