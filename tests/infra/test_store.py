"""References, names and runs."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from infra.artifact import Artifact
from infra.build import build
from infra.errors import StoreError, UnknownReference
from infra.files import atomic_write_json
from infra.gc import collect, plan_gc
from infra.store import Store, default_home, open_store
from tests.infra.toys import WORDS, WordsConfig


@pytest.fixture
def other(store: Store) -> Artifact:
    return build(store, WORDS, WordsConfig(words=("x",)), {}).artifact


def test_every_form_of_reference(store: Store, words: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    store.names.record_node("demo", "words", stage="words", status="built", artifact=words)
    store.promote(words.ref, "corpus/live")
    monkeypatch.chdir(store.home)
    for ref in (
        words.ref,
        f"words@{words.id[:5]}",
        "demo/words",
        "corpus/live",
        str(words.path),
        str(words.path / "record.json"),
        f"artifacts/words/{words.id}",
        f"./artifacts/words/{words.id}",
    ):
        assert store.resolve(ref).ref == words.ref


def test_a_copy_elsewhere_is_opened_by_its_path(store: Store, words: Artifact, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(words.path, tmp_path / "copy")
    found = store.resolve(str(tmp_path / "copy"))
    assert (found.path, found.ref) == (tmp_path / "copy", words.ref)


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("chta", "did you mean chat?"),
        ("demo/wrods", "run 'demo' has no node 'wrods'; did you mean demo/words?"),
        ("demo", "'demo' is a run; name one of its nodes: there are: demo/words"),
        ("demo/later", "node 'later' of run 'demo' has built nothing yet (running)"),
        ("dmo/words", "did you mean demo/words"),
        ("wrds@1", "nothing of stage 'wrds' here; did you mean words?"),
        ("words@zzz", "no artifact words@zzz; there are: words@"),
        ("words@", "no artifact words@; did you mean words@"),
        ("/nowhere", "/nowhere: not an artifact"),
        ("nothing at all", "a reference is run/node, a promoted name, stage@id or the path"),
        ("", "means nothing"),
    ],
)
def test_unknown_references_list_the_nearest(ref: str, says: str, store: Store, words: Artifact) -> None:
    store.names.record_node("demo", "words", stage="words", status="built", artifact=words)
    store.names.record_node("demo", "later", stage="words", status="running")
    store.promote(words.ref, "chat")
    with pytest.raises(UnknownReference) as caught:
        store.resolve(ref)
    assert says in str(caught.value)


def test_an_ambiguous_id_lists_what_it_starts(store: Store, words: Artifact) -> None:
    again = build(store, WORDS, WordsConfig(), {}, force=True).artifact
    with pytest.raises(UnknownReference, match=f"is the start of several: {words.ref}, {again.ref}"):
        store.resolve(f"words@{words.id[:6]}")
    assert store.resolve(words.ref).ref == words.ref


def test_a_name_and_a_node_may_not_mean_two_things(store: Store, words: Artifact, other: Artifact) -> None:
    store.promote(words.ref, "demo/words")
    store.names.record_node("demo", "words", stage="words", status="built", artifact=words)
    assert store.resolve("demo/words").ref == words.ref, "both mean the same"
    store.names.record_node("demo", "words", stage="words", status="built", artifact=other)
    with pytest.raises(UnknownReference, match=r"'demo/words' means two things: .*Give the stage@id instead"):
        store.resolve("demo/words")
    store.names.record_node("demo", "more", stage="words", status="built", artifact=other)
    with pytest.raises(StoreError, match="is a node of a run"):
        store.promote(words.ref, "demo/more")


def test_promotion_keeps_its_history(store: Store, words: Artifact, other: Artifact) -> None:
    store.promote(words.ref, "live", by="run demo")
    store.promote(other.ref, "live")
    document = store.names.get("live")
    assert (document["artifact"], document["digest"]) == (other.ref, other.digest)
    assert [(one["artifact"], one["by"]) for one in document["history"]] == [
        (words.ref, "run demo"),
        (other.ref, ""),
    ]
    assert document["history"][0]["record"] == words.record.record_digest


@pytest.mark.parametrize(
    "name", ["", "a@b", "../x", "/x", "a//b", "runs/x", "runs", "a/", ".x", "a b", "a" * 101]
)
def test_bad_names_are_refused(name: str, store: Store, words: Artifact) -> None:
    with pytest.raises(StoreError, match="use letters, digits"):
        store.promote(words.ref, name)
    assert store.names.all() == {}


def test_a_name_whose_artifact_is_gone(store: Store, words: Artifact) -> None:
    import shutil

    store.promote(words.ref, "live")
    shutil.rmtree(words.path)
    with pytest.raises(
        UnknownReference, match=f"live points at {words.ref}, which is no longer in the store"
    ):
        store.resolve("live")


def test_a_run_remembers_each_node(store: Store, words: Artifact, other: Artifact) -> None:
    names = store.names
    names.describe_run("demo", preset="demo", sets=["a.b=c"])
    names.record_node("demo", "words", stage="words", status="running")
    names.record_node("demo", "words", stage="words", status="built", artifact=words, seconds=1.5)
    names.record_node("demo", "words", stage="words", status="cached", artifact=words)
    names.record_node("demo", "words", stage="words", status="built", artifact=other)
    names.record_node("demo", "words", stage="words", status="failed", error="boom")
    document = names.require_run("demo")
    assert document["info"] == {"preset": "demo", "sets": ["a.b=c"]}
    node = document["nodes"]["words"]
    assert (node["status"], node["artifact"], node["details"]) == ("failed", other.ref, {"error": "boom"})
    assert [one["artifact"] for one in node["history"]] == [words.ref, other.ref]
    assert store.resolve("demo/words").ref == other.ref
    names.describe_run("later")
    assert list(names.runs()) == ["later", "demo"]
    with pytest.raises(StoreError, match="no run is called 'dmeo'; did you mean demo"):
        names.require_run("dmeo")
    for run, node_name in (("a/b", "n"), ("r", "a/b"), ("", "n")):
        with pytest.raises(StoreError, match="use letters"):
            names.record_node(run, node_name, stage="s", status="built")


def test_nodes_recorded_at_once_are_all_kept(store: Store, words: Artifact) -> None:
    def record(i: int) -> None:
        for j in range(5):
            store.names.record_node("demo", f"n{i}-{j}", stage="words", status="built", artifact=words)

    threads = [threading.Thread(target=record, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.names.require_run("demo")["nodes"]) == 20


def test_a_torn_names_file_is_named(store: Store) -> None:
    atomic_write_json(store.home / "names" / "x.json", {}, points=None)
    (store.home / "names" / "x.json").write_text("{")
    with pytest.raises(StoreError, match=r"names/x\.json: not readable as JSON"):
        store.resolve("x")


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"artifact": 3, "history": []}', '{"nodes": []}'])
def test_a_names_file_of_another_form_is_named(store: Store, text: str) -> None:
    for key, ref in (("names/x.json", "x"), ("names/runs/r.json", "r/x")):
        (store.home / key).parent.mkdir(parents=True, exist_ok=True)
        (store.home / key).write_text(text)
        with pytest.raises(
            StoreError, match=rf"{key}: it has no '\w+', so it was changed; restore or delete"
        ):
            store.resolve(ref)
        (store.home / key).unlink()


def test_references_that_no_path_can_have(store: Store) -> None:
    for ref in ("x" * 5000, "./" + "x" * 300, "~nosuchuser/x"):
        with pytest.raises(UnknownReference):
            store.resolve(ref)


def test_broken_records_are_listed_not_hidden(store: Store, words: Artifact, other: Artifact) -> None:
    (other.path / "record.json").write_text("nonsense")
    assert [one.ref for one in store.artifacts()] == [words.ref]
    assert list(store.broken()) == [other.ref]
    (store.home / "artifacts" / "words" / "not-an-artifact").mkdir()
    assert sorted(store.refs()) == sorted([words.ref, other.ref])


def test_something_in_the_way_is_not_overwritten(store: Store) -> None:
    from infra.build import plan

    folder = store.folder("words", plan(store, WORDS, WordsConfig(), {}).id)
    folder.mkdir(parents=True)
    (folder / "precious").write_text("x")
    ran: list[str] = []
    stage = dataclasses.replace(WORDS, run=lambda config, context: ran.append("it"))
    with pytest.raises(StoreError, match="is in the way"):
        build(store, stage, WordsConfig(), {})
    assert not ran, "it is found before the stage runs"
    assert plan_gc(store).strays == (folder,)
    collect(store, plan_gc(store, min_age_hours=0))
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADWATER_HOME", raising=False)
    assert default_home().name == ".headwater"
    monkeypatch.setenv("HEADWATER_HOME", str(tmp_path / "h"))
    assert open_store().home == tmp_path / "h"
    monkeypatch.setenv("HEADWATER_HOME", "~nosuchuser/x")
    with pytest.raises(StoreError, match="no such user; set HEADWATER_HOME"):
        open_store()
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="HEADWATER_HOME"):
            open_store(bad)


def test_what_lies_in_another_store_is_looked_at_there_and_not_named_here(
    store: Store, words: Artifact, tmp_path: Path
) -> None:
    import shutil

    here = open_store(tmp_path / "here")
    found = here.resolve(str(words.path))
    assert here.around(found).home == store.home
    assert store.around(words) is store
    for use in (here.own, lambda ref: here.promote(ref, "live")):
        with pytest.raises(StoreError, match=rf"but in {store.home}: work there \(--home"):
            use(str(words.path))
    assert here.names.get("live") is None
    shutil.copytree(words.path, tmp_path / "copy")
    with pytest.raises(StoreError, match=rf"does not lie in the store {here.home}\. "):
        here.own(str(tmp_path / "copy"))
    assert store.own(str(tmp_path / "copy")).path == words.path, "the store has this very artifact"
    assert store.own(str(words.path)).ref == words.ref
