"""record.json: it cannot change unnoticed, and old ones can be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from infra.artifact import Artifact
from infra.errors import CorruptArtifact, StoreError
from infra.files import render_json
from infra.record import (
    FileEntry,
    Record,
    from_bytes,
    hash_files,
    is_side_file,
    migrate,
    payload_digest,
    read_record,
    self_digest,
)


def small() -> Record:
    return Record(
        stage="s",
        version=1,
        id="0" * 12,
        attempt=1,
        fingerprint="0" * 64,
        digest="1" * 64,
        inputs=(),
        sources={},
        config={"identity": {"a": 0.1}, "placement": {}},
        seed=0,
        code={"commit": "", "dirty": "", "modules": {}},
        environment={},
        files=(FileEntry("a b", 1, "2" * 64),),
        side_files=(),
        metrics={"é": 1},
        timings={},
        started="t0",
        finished="t1",
        tries=({"started": "t0"},),
    )


def test_it_reads_back() -> None:
    record = small()
    found = from_bytes(record.render())
    assert dataclasses.replace(found, record_digest="") == record
    assert found.render() == record.render()
    assert len(found.record_digest) == 64


def test_every_flipped_byte_is_noticed() -> None:
    raw = small().render()
    for i in range(len(raw)):
        for bit in (1, 0x2A):
            with pytest.raises((CorruptArtifact, StoreError)):
                from_bytes(raw[:i] + bytes([raw[i] ^ bit]) + raw[i + 1 :], "here/record.json")


@pytest.mark.parametrize(
    ("field", "value", "changed"),
    [("metrics", {"a": 1e-05}, b"1e905"), ("metrics", {"a": "x\nd800"}, b"\\ud800")],
)
def test_a_byte_that_leaves_what_json_cannot_hold_is_noticed(
    field: str, value: object, changed: bytes
) -> None:
    raw = dataclasses.replace(small(), **{field: value}).render()
    before = changed.replace(b"1e9", b"1e-").replace(b"\\u", b"\\n")
    assert raw.count(before) == 1
    with pytest.raises(CorruptArtifact, match=r"here/record\.json: it was changed after publishing"):
        from_bytes(raw.replace(before, changed), "here/record.json")


def test_a_record_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    with pytest.raises(StoreError, match=r"record\.json: cannot be read \(Is a directory\)"):
        read_record(tmp_path)


def test_a_changed_field_names_the_file() -> None:
    data = json.loads(small().render())
    data["metrics"]["é"] = 2
    with pytest.raises(CorruptArtifact, match=r"here/record\.json: it was changed after publishing"):
        from_bytes(render_json(data), "here/record.json")
    data["record_digest"] = self_digest(data)
    assert from_bytes(render_json(data)).metrics == {"é": 2}
    del data["seed"]
    data["record_digest"] = self_digest(data)
    with pytest.raises(CorruptArtifact, match="missing or unknown fields: seed"):
        from_bytes(render_json(data))


def test_migrations_run_one_step_at_a_time() -> None:
    def one_to_two(data: dict[str, Any]) -> dict[str, Any]:
        data["label"] = data.pop("name")
        return data

    def two_to_three(data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "size": len(data["label"])}

    steps = {1: one_to_two, 2: two_to_three}
    old = {"schema": 1, "name": "abc"}
    assert migrate(old, steps, 3) == {"schema": 3, "label": "abc", "size": 3}
    assert old == {"schema": 1, "name": "abc"}
    assert migrate({"schema": 2, "label": "x"}, steps, 3) == {"schema": 3, "label": "x", "size": 1}
    assert migrate({"schema": 3, "any": 0}, steps, 3) == {"schema": 3, "any": 0}
    with pytest.raises(StoreError, match="no migration leads from schema 1 to 2"):
        migrate(old, {2: two_to_three}, 3)


@pytest.mark.parametrize("schema", [0, -1, True, "1", None])
def test_a_schema_that_is_no_version(schema: object) -> None:
    with pytest.raises(StoreError, match="not a version number"):
        migrate({"schema": schema})


def test_a_newer_schema_says_update() -> None:
    data = json.loads(small().render())
    data["schema"] = 999
    data["record_digest"] = self_digest(data)
    with pytest.raises(StoreError, match=r"r\.json: schema 999 is newer .* update Headwater"):
        from_bytes(render_json(data), "r.json")


def test_side_files() -> None:
    assert [is_side_file(path) for path in ("logs/a", "plots/x/y.png", "report.html")] == [True] * 3
    assert [is_side_file(path) for path in ("logs", "plots.json", "pages/a.html", "a/logs/b", "x.json")] == [
        False
    ] * 5


def test_hashing_a_payload(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "logs/l.txt", "r.html", "b/empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name if name != "b/empty" else "")
    (tmp_path / "hollow").mkdir()
    files, side = hash_files(tmp_path)
    assert [one.path for one in files] == ["a.txt", "b/2.txt", "b/empty"]
    assert [one.path for one in side] == ["logs/l.txt", "r.html"]
    before = payload_digest(files)
    (tmp_path / "logs/l.txt").write_text("other")
    assert payload_digest(hash_files(tmp_path)[0]) == before
    (tmp_path / "b/empty").rename(tmp_path / "b/void")
    assert payload_digest(hash_files(tmp_path)[0]) != before


def test_links_in_a_payload_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match=r"link: a payload may hold plain files and folders only"):
        hash_files(tmp_path)


def test_a_folder_without_a_record_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not an artifact \(it has no record\.json\)"):
        read_record(tmp_path)


def test_an_artifact_names_what_it_does_not_hold(words: Artifact) -> None:
    assert words.file("words/001.txt").read_text() == "two" * 4
    assert words.json("stats.json") == {"words": 3, "seed": 0}
    assert [path.name for path in words.files("words/*")] == ["000.txt", "001.txt", "002.txt"]
    assert words.folder("words") == words.path / "words"
    for act in (
        lambda: words.file("stat.json"),
        lambda: words.files("*.parquet"),
        lambda: words.folder("word"),
    ):
        with pytest.raises(Exception, match=rf"{words.ref} holds no file"):
            act()
    (words.path / "stats.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"stats\.json is listed in the record but missing"):
        words.file("stats.json")
