"""verify finds every changed byte, here and upstream."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from infra.artifact import Artifact
from infra.build import build
from infra.errors import CorruptArtifact
from infra.files import render_json
from infra.record import self_digest
from infra.store import Store
from infra.verify import require_intact, verify
from tests.infra.toys import TRAIN, TrainConfig


@pytest.fixture
def trained(store: Store, words: Artifact) -> Artifact:
    base = build(store, TRAIN, TrainConfig(steps=1), {"words": [words]}).artifact
    return build(store, TRAIN, TrainConfig(), {"words": [words], "base": [base]}).artifact


def test_all_is_well(store: Store, words: Artifact, trained: Artifact) -> None:
    found = verify(store, trained)
    assert found.ok
    assert found.checked[0] == trained.ref
    assert set(found.checked) == set(store.refs())
    assert found.bytes == sum(store.resolve(ref).record.size for ref in store.refs())


def test_a_flipped_byte_in_any_file_of_the_chain_is_found(store: Store, trained: Artifact) -> None:
    for path in sorted((store.home / "artifacts").rglob("*")):
        if not path.is_file():
            continue
        raw = path.read_bytes()
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
        if path == trained.path / "record.json":
            with pytest.raises(CorruptArtifact, match=str(path)):
                store.resolve(trained.ref)
        else:
            assert str(path) in {problem.path for problem in verify(store, trained).problems}
        path.write_bytes(raw)
    assert verify(store, trained).ok


def test_missing_extra_and_resized_files(store: Store, words: Artifact, trained: Artifact) -> None:
    (words.path / "stats.json").unlink()
    (words.path / "more.txt").write_text("x")
    (words.path / "words" / "000.txt").write_text("longer than before")
    (trained.path / "plots").mkdir()
    (trained.path / "plots" / "late.png").write_bytes(b"x")
    kinds = {(problem.kind, Path(problem.path).name) for problem in verify(store, trained).problems}
    assert kinds == {
        ("missing", "stats.json"),
        ("extra", "more.txt"),
        ("changed", "000.txt"),
        ("extra", "late.png"),
    }
    with pytest.raises(CorruptArtifact) as caught:
        require_intact([words])
    for name in ("stats.json", "more.txt", "000.txt"):
        assert name in str(caught.value)
    (words.path / "link").symlink_to("/etc")
    assert verify(store, trained).problems[-1].kind == "extra"


def test_an_artifact_upstream_that_is_gone(store: Store, words: Artifact, trained: Artifact) -> None:
    shutil.rmtree(words.path)
    (problem,) = [one for one in verify(store, trained).problems if f"read by {trained.ref}" in one.detail]
    assert (problem.ref, problem.kind) == (words.ref, "missing")


def test_a_record_rewritten_with_a_good_self_digest(store: Store, words: Artifact, trained: Artifact) -> None:
    path = words.path / "record.json"
    data = json.loads(path.read_bytes())
    data["metrics"]["words"] = 4
    data["config"]["identity"]["seed"] = 1
    data["record_digest"] = self_digest(data)
    path.write_bytes(render_json(data))
    details = {problem.detail for problem in verify(store, trained).problems}
    assert f"not the record that {trained.ref} was built from" in details
    assert "its fingerprint does not follow from its content" in details


def test_a_payload_and_record_exchanged_together(store: Store, words: Artifact, trained: Artifact) -> None:
    (words.path / "words" / "000.txt").write_bytes(b"ONEONEONEONE")
    path = words.path / "record.json"
    data = json.loads(path.read_bytes())
    from infra.files import sha256_file

    for entry in data["files"]:
        entry["sha256"] = sha256_file(words.path / entry["path"])
    data["record_digest"] = self_digest(data)
    path.write_bytes(render_json(data))
    details = {problem.detail for problem in verify(store, trained).problems}
    assert "its digest does not follow from its content" in details
