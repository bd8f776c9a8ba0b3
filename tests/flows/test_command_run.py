"""What `headwater run` does around a run: what it prints, advises and returns, in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flows import report_page
from flows.command_run import Request, perform
from flows.execute import execute
from flows.finish import finish
from flows.open_model import open_model
from flows.preset import load
from flows.runner import Options, Pipeline
from infra.artifact import Artifact
from infra.errors import ConfigError, CorruptArtifact, DiskFull, HeadwaterError
from infra.names import Names
from infra.store import Store
from tests.flows.conftest import TOY, statuses

Toy = Callable[..., Any]
Capture = pytest.CaptureFixture[str]


def request(*sets: str, **more: Any) -> Request:
    return Request(str(TOY), sets, **{"prefect": False, **more})


def prefect_apart(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Prefect, which makes its home when it is imported, make it here."""
    (store.home / "prefect").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PREFECT_HOME", str(store.home / "prefect"))


def full(*given: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_end_hides_no_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(report_page, "atomic_write_text", full)
    assert perform(request("left.crash=error", options=Options(stop=("left",)))) == 1
    said = capsys.readouterr()
    assert "left failed: source: the numbers have run out" in said.err
    assert "report.html could not be written (No space left on device)" in said.out


def test_a_full_disk_while_a_node_is_noted_hides_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Names.record_node

    def note(self: Names, run: str, node: str, **more: Any) -> Any:
        if more["status"] == "failed":
            raise DiskFull("no space left while writing names/")
        return real(self, run, node, **more)

    monkeypatch.setattr(Names, "record_node", note)
    heard: list[Mapping[str, Any]] = []
    pipeline = Pipeline(
        store,
        load(str(TOY), ["left.crash=error"]),
        options=Options(stop=("left",)),
        listen=lambda node, event: heard.append(event),
    )
    result = asyncio.run(pipeline.execute(lambda task: execute(store, task, pipeline.listen)))
    assert result.outcomes["left"].error == "source: the numbers have run out; set count lower"
    assert any(
        "that it is failed is not noted in run toy: no space" in one.get("message", "") for one in heard
    )


def test_what_fails_after_the_builds_keeps_their_result(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run inside Prefect is not taken for lost and made again."""
    prefect_apart(store, monkeypatch)
    from flows import pipeline

    async def away() -> bool:
        return False

    monkeypatch.setattr(pipeline, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(pipeline.prefect_artifacts, "reachable", away)
    monkeypatch.setattr(pipeline, "finish", full)
    kept = pipeline.Kept()
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(
            pipeline.pipeline_flow(lambda node, event: None, kept).fn(
                preset=str(TOY),
                run="",
                settings=["left.crash=error"],
                from_nodes=[],
                to_nodes=["left"],
                force=False,
                refresh=False,
                parallel=0,
            )
        )
    assert kept.result is not None
    assert statuses(kept.result) == {"left": "failed"}


def test_changed_code_is_said_when_everything_is_cached(
    tmp_path: Path, store: Store, capsys: Capture
) -> None:
    folder = tmp_path / "stages"
    folder.mkdir()
    stage = (TOY.parent / "source.py").read_text()
    (folder / "source.py").write_text(stage)
    preset = tmp_path / "one.yaml"
    preset.write_text("stages: [stages]\nnodes: {left: {stage: source}}\n")
    assert perform(Request(str(preset), prefect=False)) == 0
    (folder / "source.py").write_text(stage + "\n# another comment\n")
    capsys.readouterr()
    assert perform(Request(str(preset))) == 0
    said = capsys.readouterr().err
    assert "left      reused, though its code has changed since: source.py (--refresh rebuilds)" in said
    assert said.count("reused") == 1


def test_an_event_that_cannot_be_sent_costs_a_warning(tmp_path: Path, store: Store, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    target = str(tmp_path / "file" / "events.jsonl")
    left = Options(stop=("left",))
    assert perform(request(options=left, openlineage=target)) == 0
    said = capsys.readouterr()
    assert f"OpenLineage event not written to {target}" in said.err
    assert "left  built" in said.out
    with pytest.raises(ConfigError, match="OpenLineage target 'ftp://x'"):
        perform(request(options=left, openlineage="ftp://x"))


def test_a_request_as_one_types_it() -> None:
    options = Options(start=("a",), stop=("b", "c"), force=True, refresh=True, parallel=2)
    given = Request("demo", ("a.b=x y",), "mine", options, False, "http://x", "/my home")
    assert given.command() == (
        "headwater --home '/my home' run --preset demo --run mine --from a --to b --to c "
        "--set 'a.b=x y' --force --refresh --parallel 2 --no-prefect --openlineage http://x"
    )
    assert Request("demo").command() == "headwater run --preset demo"


def test_the_home_that_was_given_is_in_the_advice(headwater: Toy, tmp_path: Path) -> None:
    home = str(tmp_path / "other home")
    left = ("run", "--preset", str(TOY), "--no-prefect", "--to", "left", "--set", "left.crash=error")
    done = headwater("--home", home, *left)
    again = f"headwater --home '{home}' run --preset {TOY} --to left --set left.crash=error --no-prefect\n"
    assert f"when it is mended: {again}" in done.stderr


def test_a_refresh_takes_the_settings_and_nodes_of_each_run(
    quick: Toy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefect_apart(store, monkeypatch)
    from flows.refresh import refresh_runs

    quick("left.count=9", stop=("control",))
    called: list[dict[str, Any]] = []
    said: list[str] = []

    async def again(**given: Any) -> None:
        called.append(given)
        if len(called) > 1:
            raise ConfigError("its preset is gone")

    assert asyncio.run(refresh_runs(store, ["demo", "toy"], again, said.append)) == ["toy"]
    made = ["left", "control"]
    assert called == [{"preset": str(TOY), "run": "toy", "settings": ["left.count=9"], "to_nodes": made}]
    assert said == [f"demo has never been run in {store.home}: nothing to refresh"]
    with pytest.raises(HeadwaterError, match="toy: its preset is gone"):
        asyncio.run(refresh_runs(store, ["toy"], again, said.append))


def test_a_refresh_leaves_a_name_that_somebody_else_has_set(quick: Toy, store: Store) -> None:
    result, _ = quick()
    assert finish(store, result, yielding=True).promotion.startswith("answer is ")
    other = store.promote("toy/train", "answer", by="headwater promote")
    said = f"answer stays {other.ref}, as headwater promote set it"
    assert finish(store, result, yielding=True).promotion == said
    assert store.names.get("answer")["artifact"] == other.ref
    assert finish(store, result).promotion == f"answer is {result.outcomes['last'].artifact.ref}"


def test_what_is_damaged_is_neither_promoted_nor_opened(quick: Toy, store: Store) -> None:
    result, _ = quick()
    last = result.outcomes["last"].artifact
    made = finish(store, result)
    assert made.promotion == f"answer is {last.ref}"
    victim = last.path / "numbers.json"
    content = bytearray(victim.read_bytes())
    content[-2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=str(victim)):
        store.promote("toy/last", "best")
    for name in ("answer", "best"):
        preset = dataclasses.replace(
            result.preset, promote=dataclasses.replace(result.preset.promote, name=name)
        )
        said = finish(store, dataclasses.replace(result, preset=preset)).promotion
        assert said.startswith(f"not promoted to {name}: not what was published:")
        assert f"{victim}: content changed" in said
    assert store.names.get("best") is None


def test_a_damaged_checkpoint_is_not_opened(
    quick: Toy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = quick(stop=("left",))
    artifact = result.outcomes["left"].artifact
    victim = artifact.path / "numbers.json"
    victim.write_bytes(b"x" * victim.stat().st_size)
    monkeypatch.setattr(Artifact, "names", lambda self: ["tokenizer.json", "config.json"])
    with pytest.raises(CorruptArtifact, match=f"{victim}: content changed"):
        open_model(artifact)
