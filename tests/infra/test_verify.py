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
from infra.mend import advice
from infra.record import self_digest
from infra.store import Store
from infra.verify import require_intact, verify
from tests.infra.toys import TRAIN, WORDS, TrainConfig, WordsConfig


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
        require_intact(store, [words])
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


def flip(artifact: Artifact, name: str) -> None:
    raw = bytearray((artifact.path / name).read_bytes())
    raw[0] ^= 1
    (artifact.path / name).write_bytes(raw)


@pytest.mark.parametrize("damage", ["payload", "record", "gone"])
def test_an_input_that_was_built_again_is_healed(
    store: Store, words: Artifact, trained: Artifact, damage: str
) -> None:
    if damage != "gone":
        flip(words, {"payload": "stats.json", "record": "record.json"}[damage])
        assert not verify(store, trained).ok
    again = build(store, WORDS, WordsConfig(), {}, force=True).artifact
    if damage == "gone":
        shutil.rmtree(words.path)
    found = verify(store, trained)
    assert found.ok
    (told,) = found.healed
    assert told.startswith(f"{words.ref}: ")
    assert told.endswith(f"{again.ref} holds the same bytes")
    flip(again, "stats.json")
    assert not verify(store, trained).ok, "both are damaged now"


def test_an_intact_attempt_is_read_in_place_of_a_damaged_one(store: Store, words: Artifact) -> None:
    flip(words, "stats.json")
    with pytest.raises(CorruptArtifact, match=rf"build {words.ref} again: .*stage words.*--force"):
        build(store, TRAIN, TrainConfig(), {"words": [words]})
    again = build(store, WORDS, WordsConfig(), {}, force=True).artifact
    said: list[str] = []
    made = build(
        store, TRAIN, TrainConfig(), {"words": [words]}, events=lambda event: said.append(str(event))
    ).artifact
    assert [pin.ref for pin in made.record.inputs] == [again.ref]
    assert any(f"{words.ref} is damaged; {again.ref}, the same bytes, is read" in one for one in said)


def test_the_advice_is_the_whole_command(store: Store, words: Artifact) -> None:
    store.names.describe_run("mine", preset="demo", name="demo", sets=["a.b=c d"])
    store.names.record_node("mine", "first", stage="words", status="built", artifact=words)
    again = f"headwater --home {store.home} run --preset demo --run mine --set 'a.b=c d' "
    again += "--from first --to first --force"
    assert advice(store, words.ref) == f"restore the file, or build {words.ref} again: {again}"
    assert advice(store, f"{words.ref}-2").endswith(again)
