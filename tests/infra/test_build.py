"""Building: reuse, new attempts, drift, reasons, and what a stage may not do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from infra.artifact import Artifact
from infra.build import build, plan
from infra.config import StageConfig
from infra.errors import BuildError, ConfigError, CorruptArtifact
from infra.stage import SourceFile, Stage, StageContext
from infra.store import Store
from tests.infra.toys import TRAIN, WORDS, Shape, TrainConfig, WordsConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Heard:
    """The events of a build."""

    events: list[dict[str, Any]]

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def messages(self, level: str = "info") -> list[str]:
        return [one["message"] for one in self.events if one["event"] == "log" and one["level"] == level]


@pytest.fixture
def heard() -> Heard:
    return Heard([])


def toy(run: Callable[[Any, StageContext], None], **changes: Any) -> Stage:
    """A stage made of one function."""
    return replace(Stage("toy", 1, StageConfig, run), **changes)


def test_built_then_cached(store: Store, heard: Heard) -> None:
    first = build(store, WORDS, WordsConfig(), {}, events=heard)
    assert first.status == "built"
    assert heard.messages()[0] == "building words: first words in this store"
    assert {"event": "progress", "done": 3, "total": 3} in heard.events
    second = build(store, WORDS, WordsConfig(threads=7, shape=Shape(workers=9)), {})
    assert (second.status, second.artifact.ref) == ("cached", first.artifact.ref)
    assert store.refs() == [first.artifact.ref]
    assert list((store.home / "work").iterdir()) == []


def test_the_record_says_how_it_came_to_be(store: Store, words: Artifact) -> None:
    run = {"id": "42", "url": "http://127.0.0.1/v2/runs/42"}
    config = TrainConfig(seed=5, threads=1)
    record = build(store, TRAIN, config, {"words": [words]}, prefect=run).artifact.record
    assert (record.stage, record.version, record.attempt, record.seed) == ("train", 1, 1, 5)
    assert record.id == record.fingerprint[:12]
    (read,) = record.inputs
    assert (read.role, read.ref) == ("words", words.ref)
    assert (read.digest, read.record) == (words.digest, words.record.record_digest)
    assert record.config["identity"]["steps"] == 6
    assert record.config["placement"] == {"threads": 1, "pause": 0.0}
    assert {"tests/infra/toys.py", "infra/checkpoint.py"} <= set(record.code["modules"])
    assert record.environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record.environment["packages"]["torch"].startswith("2.")
    assert record.environment["numerics"]["threads"] >= 1
    assert set(record.environment["hardware"]) == {"system", "cpu", "cores", "memory_bytes", "gpus"}
    assert record.prefect == run
    assert record.started < record.finished
    assert record.timings["seconds"] > 0
    assert record.timings["peak_memory_bytes"] > 1e6
    assert set(record.metrics) == {"norm"}
    assert [one.path for one in record.files] == ["config.json", "model.safetensors"]
    assert [one.path for one in record.side_files] == ["logs/stage.log"]
    log = (store.folder("train", record.id) / "logs" / "stage.log").read_text()
    assert "building train: first train in this store" in log


def test_force_makes_a_new_attempt_and_downstream_stays_valid(store: Store, words: Artifact) -> None:
    trained = build(store, TRAIN, TrainConfig(), {"words": [words]})
    again = build(store, WORDS, WordsConfig(), {}, force=True)
    assert (again.status, again.artifact.id, again.artifact.record.attempt) == ("built", words.id + "-2", 2)
    assert again.artifact.digest == words.digest
    assert again.artifact.record.record_digest != words.record.record_digest
    clock = [one.record.side_files[0].sha256 for one in (words, again.artifact)]
    assert clock[0] != clock[1], "logs differ and are not in the digest"
    reused = build(store, TRAIN, TrainConfig(), {"words": [again.artifact]})
    assert (reused.status, reused.artifact.ref) == ("cached", trained.artifact.ref)
    assert build(store, WORDS, WordsConfig(), {}).artifact.ref == again.artifact.ref
    assert build(store, WORDS, WordsConfig(), {}, force=True).artifact.id == words.id + "-3"


def test_why_names_the_fields_that_differ_from_the_nearest_earlier(
    store: Store, words: Artifact, heard: Heard
) -> None:
    build(store, TRAIN, TrainConfig(steps=20, every=10, rate=0.25), {"words": [words]})
    nearest = build(store, TRAIN, TrainConfig(), {"words": [words]}).artifact
    build(store, TRAIN, TrainConfig(steps=8), {"words": [words]}, events=heard)
    assert f"building train: config.steps: 6 -> 8 (nearest earlier: {nearest.ref})" in heard.messages()
    other = build(store, WORDS, WordsConfig(words=("x",)), {}).artifact
    assert plan(store, TRAIN, TrainConfig(), {"words": [other]}).why == (
        f"inputs.words: {words.ref} -> {other.ref} (nearest earlier: {nearest.ref})",
    )
    assert plan(store, replace(TRAIN, version=2), TrainConfig(), {"words": [words]}).why == (
        f"version: 1 -> 2 (nearest earlier: {nearest.ref})",
    )
    assert plan(store, TRAIN, TrainConfig(), {"words": [words]}).why == ()


STAGE_FILE = '''
"""A stage of somebody's own."""
from infra.config import StageConfig
from infra.stage import Stage

def run(config, context):
    from own_helper import VALUE
    context.write_json("value.json", VALUE)

STAGE = Stage("own", 1, StageConfig, run)
'''


def test_drift_names_the_changed_files_and_refresh_rebuilds(
    store: Store, tmp_path: Path, heard: Heard
) -> None:
    (tmp_path / "own_stage.py").write_text(STAGE_FILE)
    (tmp_path / "own_helper.py").write_text("VALUE = 1\n")
    spec = importlib.util.spec_from_file_location("own_stage", tmp_path / "own_stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stage = module.STAGE
    sys.path.insert(0, str(tmp_path))
    try:
        first = build(store, stage, StageConfig(), {}).artifact
        assert stage.description == "A stage of somebody's own."
        assert {"own_stage.py", "own_helper.py", "infra/stage.py"} <= set(first.record.code["modules"])
        assert build(store, stage, StageConfig(), {}, refresh=True).status == "cached", "nothing changed yet"

        (tmp_path / "own_helper.py").write_text("VALUE = 22\n")
        os.utime(tmp_path / "own_helper.py", (1, 1))
        sys.modules.pop("own_helper")
        assert plan(store, stage, StageConfig(), {}).drift == ("own_helper.py",)
        reused = build(store, stage, StageConfig(), {}, events=heard)
        assert (reused.status, reused.artifact.ref) == ("cached", first.ref)
        (warning,) = heard.messages("warning")
        assert warning.startswith(f"{first.ref} is reused, though code has changed since it was built:")
        assert warning.endswith(": own_helper.py (--refresh rebuilds)")
        renewed = build(store, stage, StageConfig(), {}, refresh=True, events=heard)
        assert (renewed.status, renewed.artifact.id) == ("built", first.id + "-2")
        assert renewed.artifact.json("value.json") == 22
        assert "building own: code changed: own_helper.py" in heard.messages()
        assert build(store, stage, StageConfig(), {}, refresh=True).status == "cached"
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("own_helper", None)


def test_scanned_sources_are_part_of_the_fingerprint(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    config = WordsConfig(folder=str(folder))
    first = build(store, WORDS, config, {}).artifact
    assert (first.record.sources["files"], first.record.sources["bytes"]) == (1, 1)
    assert first.json("sources.json")[0][:2] == ["a.txt", 1]
    assert build(store, WORDS, config, {}).status == "cached"
    (folder / "a.txt").write_text("b")
    planned = plan(store, WORDS, config, {})
    assert planned.hit is None
    assert planned.why[0].startswith("sources: 1 files, 1 bytes (digest ")
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("new")
    assert plan(store, WORDS, config, {}).hit is None
    (folder / "b.txt").unlink()
    assert plan(store, WORDS, config, {}).hit.ref == first.ref


def test_the_order_in_which_sources_are_found_does_not_count(store: Store) -> None:
    files = [SourceFile("a", 1, "0"), SourceFile("b", 2, "1")]
    one = plan(store, replace(WORDS, scan=lambda config: files), WordsConfig(), {})
    two = plan(store, replace(WORDS, scan=lambda config: files[::-1]), WordsConfig(), {})
    assert one.fingerprint == two.fingerprint


def test_a_flipped_byte_in_an_input_is_refused_naming_the_file(store: Store, words: Artifact) -> None:
    path = words.path / "words" / "001.txt"
    path.write_bytes(b"twotwotwotwp")
    with pytest.raises(CorruptArtifact) as caught:
        build(store, TRAIN, TrainConfig(), {"words": [words]})
    assert words.ref in str(caught.value)
    assert str(path) in str(caught.value)
    assert store.ids("train") == []
    assert not (store.home / "work").exists() or list((store.home / "work").iterdir()) == []


def test_a_damaged_hit_is_refused_and_force_replaces_it(store: Store, words: Artifact) -> None:
    (words.path / "stats.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"(?s)stats\.json.*build words@.* again: .*--force"):
        build(store, WORDS, WordsConfig(), {})
    (words.path / "record.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"record\.json: it was changed after publishing"):
        build(store, WORDS, WordsConfig(), {})
    again = build(store, WORDS, WordsConfig(), {}, force=True)
    assert (again.artifact.id, again.artifact.digest) == (words.id + "-2", words.digest)
    assert build(store, WORDS, WordsConfig(), {}).artifact.ref == again.artifact.ref


def test_a_failing_stage_publishes_nothing_and_keeps_its_scratch(store: Store, heard: Heard) -> None:
    tries = []

    def run(config: StageConfig, context: StageContext) -> None:
        tries.append((context.resumed, sorted(path.name for path in context.out.iterdir())))
        (context.scratch / "kept").write_text("x")
        (context.out / "half.txt").write_text("x")
        context.log("about to fail")
        if len(tries) < 3:
            raise RuntimeError("boom")

    stage = toy(run)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom") as caught:
            build(store, stage, StageConfig(), {})
        assert "its work so far is kept in" in caught.value.__notes__[0]
        assert store.refs() == []
    done = build(store, stage, StageConfig(), {}, events=heard)
    assert tries == [(False, []), (True, []), (True, [])]
    assert done.status == "resumed"
    assert len(done.artifact.record.tries) == 3
    assert done.artifact.file("logs/stage.log").read_text().count("about to fail") == 3


def test_an_attempt_that_comes_out_differently_is_told(store: Store, heard: Heard) -> None:
    def run(config: StageConfig, context: StageContext) -> None:
        context.write_json("same.json", 1)
        context.write_json("clock.json", time.monotonic_ns())

    first = build(store, toy(run), StageConfig(), {}).artifact
    again = build(store, toy(run), StageConfig(), {}, force=True, events=heard).artifact
    assert heard.messages("warning") == [
        f"{again.ref} differs from {first.ref} in clock.json "
        "(same code, same numerics class: the stage is not deterministic)"
    ]


def test_scratch_of_other_code_is_resumed_with_a_warning_or_dropped_on_refresh(
    store: Store, heard: Heard
) -> None:
    def run(config: StageConfig, context: StageContext) -> None:
        if not context.resumed:
            (context.scratch / "kept").write_text("x")
            raise RuntimeError("first")
        context.write_json("x.json", 1)

    stage = toy(run)

    def fail_once_with_other_code() -> Path:
        with pytest.raises(RuntimeError):
            build(store, stage, StageConfig(), {}, force=True)
        (work,) = (store.home / "work").iterdir()
        note = json.loads((work / "try.json").read_text())
        note["modules"]["infra/files.py"] = "other"
        (work / "try.json").write_text(json.dumps(note))
        return work

    fail_once_with_other_code()
    assert build(store, stage, StageConfig(), {}, events=heard).status == "resumed"
    assert "changed: infra/files.py" in heard.messages("warning")[0]
    work = fail_once_with_other_code()
    with pytest.raises(RuntimeError):
        build(store, stage, StageConfig(), {}, force=True, refresh=True, events=heard)
    assert any(one.startswith("starting afresh: code changed") for one in heard.messages())
    (work / "try.json").write_text("torn")
    with pytest.raises(RuntimeError):
        build(store, stage, StageConfig(), {}, force=True, events=heard)
    assert "is removed" in heard.messages("warning")[-1]


def test_an_unserialisable_config_is_refused_before_anything_is_made(store: Store) -> None:
    class Odd(StageConfig):
        inner: dict[str, Any] = {"deep": {1, 2}}  # noqa: RUF012  what is being refused

    stage = Stage("odd", 1, Odd, lambda config, context: None)
    with pytest.raises(ConfigError, match=r"inner\.deep: set cannot be written as JSON deterministically"):
        build(store, stage, Odd(), {})
    assert not (store.home / "work").exists()
    with pytest.raises(BuildError, match="expected a WordsConfig, not Odd"):
        build(store, WORDS, Odd(), {})


def test_planning_loads_no_heavy_library(store: Store, words: Artifact) -> None:
    code = (
        "import sys\n"
        "from infra import gc, lineage_page, provenance\n"
        "from infra.build import plan\nfrom infra.store import Store\n"
        "from tests.infra.toys import TRAIN, TrainConfig\n"
        f"store = Store({str(store.home)!r})\n"
        "plan(store, TRAIN, TrainConfig(), {'words': list(store.artifacts('words'))})\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'prefect', 'datasets', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_message_that_is_no_text_does_not_end_the_stage(store: Store) -> None:
    def talk(config: WordsConfig, context: StageContext) -> None:
        context.log("file \udcff.txt")
        context.write_json("x.json", 1)

    made = build(store, Stage("talk", 1, WordsConfig, talk), WordsConfig(), {}).artifact
    assert "file \\udcff.txt" in made.file("logs/stage.log").read_text()
