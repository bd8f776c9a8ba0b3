"""The index is a cache; gc keeps what is reached; diff names fields."""

from __future__ import annotations

import json
import os
import sqlite3
import time

import pytest

from infra import index
from infra.artifact import Artifact
from infra.build import build
from infra.diff import causes, diff
from infra.errors import HeadwaterError, StoreError
from infra.files import render_json
from infra.gc import collect, plan_gc
from infra.record import self_digest
from infra.store import Store
from tests.infra.toys import TRAIN, WORDS, TrainConfig, WordsConfig


@pytest.fixture
def trained(store: Store, words: Artifact) -> Artifact:
    return build(store, TRAIN, TrainConfig(), {"words": [words]}).artifact


def refs(store: Store) -> list[str]:
    return [row.ref for row in index.rows(store)]


def test_rows_come_newest_first(store: Store, words: Artifact, trained: Artifact) -> None:
    first, second = index.rows(store)
    assert (first.ref, second.ref) == (trained.ref, words.ref)
    assert (first.digest, first.fingerprint) == (trained.digest, trained.record.fingerprint)
    assert (first.metrics, first.bytes) == (dict(trained.metrics), trained.record.size)
    assert [row.ref for row in index.rows(store, stage="words")] == [words.ref]
    assert len(index.rows(store, limit=1)) == 1
    later = build(store, WORDS, WordsConfig(seed=1), {}).artifact
    assert refs(store)[0] == later.ref
    assert index.readers(store) == {words.ref: [("words", trained.ref)]}


def spoil_nothing(path: str) -> None:
    return


def spoil_delete(path: str) -> None:
    os.unlink(path)


def spoil_text(path: str) -> None:
    with open(path, "w") as handle:
        handle.write("this is no database" * 100)


def spoil_layout(path: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("pragma user_version = 77")
    connection.close()


def spoil_rows(path: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("delete from artifacts where stage = 'words'")
        connection.execute("update artifacts set ref = 'ghost@1'")
    connection.close()


@pytest.mark.parametrize("spoil", [spoil_nothing, spoil_delete, spoil_text, spoil_layout, spoil_rows])
def test_whatever_happens_to_the_index_the_records_win(spoil, store: Store, trained: Artifact) -> None:
    expected = refs(store)
    spoil(str(store.home / "index.sqlite"))
    assert refs(store) == expected
    assert index.reindex(store) == (2, {})
    assert refs(store) == expected


def test_reindex_names_records_it_cannot_read(store: Store, words: Artifact, trained: Artifact) -> None:
    (words.path / "record.json").write_text("{}")
    count, broken = index.reindex(store)
    assert count == 1
    assert list(broken) == [words.ref]


def test_gc_keeps_what_names_and_runs_reach(store: Store, words: Artifact, trained: Artifact) -> None:
    made = {seed: build(store, WORDS, WordsConfig(seed=seed), {}).artifact for seed in (1, 2, 3)}
    store.promote(trained.ref, "chat")
    store.names.record_node("old", "n", stage="words", status="built", artifact=made[1])
    store.names.record_node("new", "n", stage="words", status="built", artifact=made[2])
    assert plan_gc(store).garbage == (), "everything is younger than an hour"
    sweep = plan_gc(store, runs=1, min_age_hours=0)
    assert sweep.kept == {
        trained.ref: "promoted as chat",
        words.ref: f"upstream of {trained.ref}",
        made[2].ref: "in run new",
    }
    assert {one.ref for one in sweep.garbage} == {made[1].ref, made[3].ref}
    assert sweep.bytes > 0
    assert len(store.refs()) == 5, "planning removes nothing"
    assert plan_gc(store, runs=2, min_age_hours=0).garbage[0].ref == made[3].ref
    removed, left = collect(store, sweep)
    assert ({one.ref for one in removed}, left) == ({made[1].ref, made[3].ref}, [])
    assert set(store.refs()) == set(sweep.kept)
    assert list((store.home / "work").iterdir()) == []
    assert set(refs(store)) == set(sweep.kept)
    assert collect(store, sweep) == ([], [])


def test_gc_removes_nothing_while_a_record_that_it_must_follow_cannot_be_read(
    store: Store, words: Artifact, trained: Artifact
) -> None:
    record = trained.path / "record.json"
    whole = record.read_bytes()
    data = json.loads(whole) | {"schema": 999}
    data["record_digest"] = self_digest(data)
    record.write_bytes(render_json(data))
    with pytest.raises(StoreError, match=rf"what {trained.ref} was built from.*update Headwater"):
        plan_gc(store, min_age_hours=0)

    record.write_bytes(whole.replace(b"train", b"trial"))
    assert {one.ref for one in plan_gc(store, min_age_hours=0).garbage} == {words.ref, trained.ref}
    record.write_bytes(whole)
    store.promote(trained.ref, "chat")
    record.write_bytes(whole.replace(b"train", b"trial"))
    with pytest.raises(StoreError, match=rf"what {trained.ref} was built from.*rebuild"):
        plan_gc(store, min_age_hours=0)


def test_gc_leaves_what_is_locked_and_what_a_build_in_progress_reads(
    store: Store, words: Artifact, trained: Artifact
) -> None:
    work = store.work("0" * 12)
    work.mkdir(parents=True)
    note = {"stage": "train", "fingerprint": "0" * 64, "inputs": [words.ref], "modules": {}, "tries": []}
    (work / "try.json").write_text(json.dumps(note))
    sweep = plan_gc(store, min_age_hours=0)
    assert sweep.kept == {words.ref: "read by 000000000000, in progress"}
    assert [one.ref for one in sweep.garbage] == [trained.ref]
    with store.lock("train", trained.record.fingerprint):
        removed, left = collect(store, sweep)
    assert removed == []
    assert [(one.ref, why) for one, why in left] == [(trained.ref, "somebody is building it now")]

    old = time.time() - 20 * 86400
    for path in (work / "try.json", work):
        os.utime(path, (old, old))
    garbage = {one.path.name: one.reason for one in plan_gc(store, min_age_hours=0).garbage}
    assert garbage[work.name] == "not touched for 20 days"
    (store.home / "work" / "trash-x").mkdir()
    assert "left by an interrupted gc" in [one.reason for one in plan_gc(store).garbage]
    collect(store, plan_gc(store, min_age_hours=0))
    assert list((store.home / "work").iterdir()) == []
    with pytest.raises(HeadwaterError, match="must be 0 or more"):
        plan_gc(store, runs=-1)


def test_gc_removes_work_whose_artifact_is_published(store: Store, words: Artifact) -> None:
    work = store.work(words.id)
    work.mkdir(parents=True)
    note = {
        "stage": "words",
        "fingerprint": words.record.fingerprint,
        "inputs": [],
        "modules": {},
        "tries": [],
    }
    (work / "try.json").write_text(json.dumps(note))
    assert [one.reason for one in plan_gc(store).garbage] == ["its artifact is published"]


def test_diff_names_the_one_field(store: Store, words: Artifact, trained: Artifact) -> None:
    other = build(store, TRAIN, TrainConfig(steps=8, threads=3), {"words": [words]}).artifact
    found = diff(trained.record, other.record)
    assert [str(one) for one in found if one.kind == "identity"] == ["config.steps: 6 -> 8"]
    assert [one.field for one in found if one.kind == "placement"] == ["config.threads"]
    assert {one.field for one in found if one.kind == "result"} == {"digest", "metrics.norm"}
    assert found[0].kind == "identity"
    assert diff(trained.record, trained.record) == []


def test_diff_of_a_second_attempt_is_empty_but_for_nothing(store: Store, words: Artifact) -> None:
    again = build(store, WORDS, WordsConfig(), {}, force=True).artifact
    assert diff(words.record, again.record) == []


def test_diff_of_nested_fields_lists_and_inputs(store: Store, words: Artifact, trained: Artifact) -> None:
    other = build(store, WORDS, WordsConfig(words=("one", "two"), shape={"width": 5}), {}).artifact
    said = [str(one) for one in diff(words.record, other.record) if one.kind == "identity"]
    assert said == ["config.shape.width: 4 -> 5", 'config.words: ["one","two","three"] -> ["one","two"]']
    more = build(store, TRAIN, TrainConfig(), {"words": [words, other]}).artifact
    said = [str(one) for one in diff(trained.record, more.record) if one.kind == "identity"]
    assert said == [f"inputs.words[1]: (none) -> {other.ref}"]
    code = {**trained.record.code, "modules": {**trained.record.code["modules"], "infra/files.py": "0" * 64}}
    import dataclasses

    changed = dataclasses.replace(trained.record, code=code)
    assert [one.field for one in diff(trained.record, changed)] == ["infra/files.py"]


def test_causes_follow_inputs_to_where_the_difference_began(
    store: Store, words: Artifact, trained: Artifact
) -> None:
    other = build(store, WORDS, WordsConfig(words=("longer words",)), {}).artifact
    base = [build(store, TRAIN, TrainConfig(), {"words": [one]}).artifact for one in (words, other)]
    final = [
        build(store, TRAIN, TrainConfig(steps=2), {"words": [words], "base": [one]}).artifact for one in base
    ]
    found = [(path, str(one)) for path, one in causes(store, final[0].record, final[1].record)]
    assert found == [("base/words", 'config.words: ["one","two","three"] -> ["longer words"]')]
