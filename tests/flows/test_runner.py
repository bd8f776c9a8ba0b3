"""The runner: what is built and what is reused, in which order, with what share of the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import runner, single
from flows.execute import Outcome, Task
from flows.preset import load
from flows.runner import Options, Pipeline, explain, figure, places
from infra import hardware
from infra.errors import BuildError, ConfigError, CorruptArtifact
from infra.store import Store
from tests.flows.conftest import TOY, digests, statuses

Toy = Callable[..., Any]


def test_a_second_run_builds_nothing(toy: Toy) -> None:
    first, events = toy()
    assert set(statuses(first).values()) == {"built"}
    assert [event["why"] for node, event in events if event["event"] == "start" and node == "left"] == [
        ["first source in this store"]
    ]
    second, events = toy()
    assert set(statuses(second).values()) == {"cached"}
    assert {event["event"] for _, event in events} == {"cached"}
    assert digests(first) == digests(second)


def test_only_what_a_changed_setting_reaches_is_built_and_why_is_said(quick: Toy) -> None:
    quick()
    result, events = quick("control.steps=3")
    assert statuses(result) == {
        "left": "cached",
        "right": "cached",
        "train": "cached",
        "control": "built",
        "last": "built",
    }
    reasons = [event["why"] for node, event in events if event["event"] == "start" and node == "control"]
    assert len(reasons) == 1
    assert any("config.steps" in reason and "-> 3" in reason for reason in reasons[0])


def test_placement_is_no_reason_to_build(quick: Toy) -> None:
    quick()
    result, _ = quick("train.pause=0.001", "train.threads=1")
    assert set(statuses(result).values()) == {"cached"}


def test_the_run_points_at_its_artifacts(quick: Toy, store: Store) -> None:
    result, _ = quick(name="mine")
    assert store.resolve("mine/train").ref == result.outcomes["train"].artifact.ref
    document = store.names.run("mine")
    assert {name: node["status"] for name, node in document["nodes"].items()} == statuses(result)


def test_from_takes_what_comes_before_from_the_cache(quick: Toy) -> None:
    quick()
    result, _ = quick(start=("control",))
    given = dict.fromkeys(("left", "right", "train"), "given")
    assert statuses(result) == {**given, "control": "cached", "last": "cached"}
    result, _ = quick(start=("control",), force=True)
    assert statuses(result)["control"] == "built"
    assert statuses(result)["train"] == "given"


def test_from_takes_what_comes_before_from_the_run_when_the_preset_has_moved_on(
    quick: Toy, store: Store
) -> None:
    first, _ = quick()
    result, events = quick("left.count=9", start=("train",), stop=("train",))
    assert result.outcomes["left"].artifact.ref == first.outcomes["left"].artifact.ref
    assert any("which is not what this preset would build" in event.get("message", "") for _, event in events)
    assert statuses(result)["train"] == "cached"


def test_from_without_a_past_says_so(quick: Toy) -> None:
    with pytest.raises(ConfigError, match=r"train\.numbers reads left, which lies before --from"):
        quick(start=("train",))


def test_to_builds_only_what_leads_there(quick: Toy) -> None:
    result, _ = quick(stop=("control",))
    assert statuses(result) == {"left": "built", "control": "built"}
    with pytest.raises(ConfigError, match="--to left is not made from --from control"):
        quick(start=("control",), stop=("left",))
    with pytest.raises(ConfigError, match="no node 'contrl'"):
        quick(stop=("contrl",))


def test_a_stage_name_stands_for_its_only_node_and_no_other(quick: Toy) -> None:
    with pytest.raises(ConfigError, match="several nodes of stage slow: train, control, last"):
        quick(stop=("slow",))


def test_force_makes_a_new_attempt_with_the_same_digest(quick: Toy) -> None:
    first, _ = quick()
    second, _ = quick(start=("train",), stop=("train",), force=True)
    made = second.outcomes["train"].artifact
    assert made.id == first.outcomes["train"].artifact.id + "-2"
    assert digests(second)["train"] == digests(first)["train"]
    third, _ = quick()
    assert set(statuses(third).values()) == {"cached"}


def test_changed_code_is_said_and_refresh_rebuilds(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "stages"
    folder.mkdir()
    stage = (TOY.parent / "source.py").read_text()
    (folder / "source.py").write_text(stage)
    preset = tmp_path / "one.yaml"
    preset.write_text("stages: [stages]\nnodes: {left: {stage: source}}\n")

    def run(**options: Any) -> tuple[dict[str, str], list[str]]:
        said: list[str] = []
        pipeline = Pipeline(
            store,
            load(str(preset)),
            options=Options(**options),
            listen=lambda node, event: said.append(event.get("message", "")),
        )
        return statuses(asyncio.run(pipeline.execute())), said

    assert run()[0] == {"left": "built"}
    (folder / "source.py").write_text(stage + "\n# another comment\n")
    state, said = run()
    assert state == {"left": "cached"}
    assert any("its code has changed since: source.py" in line for line in said)
    assert run(refresh=True)[0] == {"left": "built"}
    assert run(refresh=True)[0] == {"left": "cached"}


def test_after_a_failure_nothing_new_starts_and_what_runs_is_let_finish(toy: Toy, store: Store) -> None:
    result, _ = toy("left.crash=error", parallel=2)
    assert statuses(result) == {
        "left": "failed",
        "right": "built",
        "train": "skipped",
        "control": "skipped",
        "last": "skipped",
    }
    assert result.outcomes["left"].error == "source: the numbers have run out; set count lower"
    assert not result.ok
    assert [one.node for one in result.failed] == ["left"]
    assert store.names.run("toy")["nodes"]["left"]["status"] == "failed"


def test_a_crash_shows_the_end_of_the_log_and_an_exit_its_code(toy: Toy) -> None:
    result, _ = toy("left.crash=exception", stop=("left",))
    error = result.outcomes["left"].error
    assert error.startswith("ValueError: an unforeseen number")
    assert "Traceback" in error
    result, _ = toy("left.crash=exit", stop=("left",))
    error = result.outcomes["left"].error
    assert "ended with code 7" in error
    assert "Traceback" not in error, "the log of the try before must not be quoted"
    assert "a library that prints to standard output" in error


def test_a_changed_artifact_is_refused_as_an_input_naming_the_file(toy: Toy) -> None:
    first, _ = toy()
    victim = first.outcomes["left"].artifact.path / "numbers.json"
    content = bytearray(victim.read_bytes())
    content[-2] ^= 1
    victim.write_bytes(content)
    result, _ = toy("train.steps=9", stop=("train",))
    assert statuses(result)["train"] == "failed"
    assert str(victim) in result.outcomes["train"].error
    victim.write_bytes(b"shorter")
    with pytest.raises(CorruptArtifact, match=r"(?s)left: .*numbers\.json.*--from left --to left --force"):
        toy()
    result, _ = toy(stop=("left",), force=True)
    assert statuses(result) == {"left": "built"}


# Order and share, with builds that take no time at all


class Recorder:
    """Stands in for the workers: notes when each node runs, and with how many threads."""

    def __init__(self, store: Store, preset: str, sets: tuple[str, ...] = (), parallel: int = 0) -> None:
        self.pipeline = Pipeline(
            store, load(preset, sets), options=Options(parallel=parallel), listen=lambda node, event: None
        )
        self.started: list[str] = []
        self.threads: dict[str, int] = {}
        self.most = self.now = 0

    async def make(self, task: Task) -> Outcome:
        from infra import build

        self.started.append(task.node)
        self.threads[task.node] = task.threads
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        artifact = build.build(self.pipeline.store, task.stage, task.config, task.inputs).artifact
        self.now -= 1
        return Outcome(task.node, task.stage.name, "built", artifact)

    def run(self) -> Recorder:
        assert asyncio.run(self.pipeline.execute(self.make)).ok
        return self


def chain(tmp_path: Path, **more: int) -> str:
    """Three sources; a chain of two hangs on the last."""
    path = tmp_path / "chain.yaml"
    lines = [f"stages: ['{TOY.parent}']", *(f"{name}: {value}" for name, value in more.items()), "nodes:"]
    lines += [f"  {name}: {{stage: source, config: {{count: {i + 1}}}}}" for i, name in enumerate("abc")]
    lines += ["  d: {stage: slow, inputs: {numbers: c}}", "  e: {stage: slow, inputs: {numbers: d}}"]
    path.write_text("\n".join(lines))
    return str(path)


def test_the_longest_way_goes_first(tmp_path: Path, store: Store) -> None:
    assert Recorder(store, chain(tmp_path), parallel=1).run().started == ["c", "d", "a", "b", "e"]
    # Times of the run before outweigh the length of the chain.
    for name, seconds in (("a", 50.0), ("b", 2.0), ("c", 1.0)):
        store.names.record_node("chain", name, stage="source", status="built", seconds=seconds)
    again = Recorder(store, chain(tmp_path), ("defaults.seed=3",), parallel=1).run()
    assert again.started == ["a", "c", "b", "d", "e"]


def test_no_more_at_once_than_places(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_cores", lambda: 8)
    recorder = Recorder(store, chain(tmp_path), parallel=2).run()
    assert recorder.most == 2
    assert set(recorder.threads.values()) == {4}


def test_a_node_that_asks_for_all_threads_runs_alone(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "available_cores", lambda: 4)
    recorder = Recorder(store, chain(tmp_path), ("c.threads=4",), parallel=4)
    order: list[tuple[str, int]] = []
    make = recorder.make

    async def noted(task: Task) -> Outcome:
        order.append((task.node, recorder.now))
        return await make(task)

    assert asyncio.run(recorder.pipeline.execute(noted)).ok
    assert order[0] == ("c", 0)
    assert recorder.threads["c"] == 4
    assert dict(order)["a"] <= 2


def test_places_follow_the_preset_its_width_and_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "available_cores", lambda: 8)
    assert places(load(chain(tmp_path))) == 3
    assert places(load(chain(tmp_path, parallel=5))) == 5
    monkeypatch.setattr(hardware, "available_cores", lambda: 2)
    assert places(load(chain(tmp_path))) == 2


def test_a_builder_that_raises_ends_the_others(tmp_path: Path, store: Store) -> None:
    ended: list[str] = []

    async def make(task: Task) -> Outcome:
        if task.node == "c":
            await asyncio.sleep(0.01)
            raise BuildError("unforeseen")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(task.node)
        raise AssertionError("it was to be cancelled")

    with pytest.raises(BuildError, match="unforeseen"):
        asyncio.run(Recorder(store, chain(tmp_path), parallel=3).pipeline.execute(make))
    assert sorted(ended) == ["a", "b"]


def test_explain_builds_nothing(quick: Toy, store: Store) -> None:
    preset = load(str(TOY))
    assert explain(store, preset, "control") == [
        "left: first source in this store",
        "control: to be built after left",
    ]
    assert store.refs() == []
    quick()
    (line,) = explain(store, preset, "control")
    assert line.startswith("control: in the store as slow@")
    (line,) = explain(store, load(str(TOY), ["control.steps=7"]), "control")
    assert "config.steps: 2 -> 7" in line


def test_figures_are_numbers_of_the_record(quick: Toy) -> None:
    result, _ = quick()
    assert figure(result, "train", "score") == 0.75
    with pytest.raises(ConfigError, match="score"):
        figure(result, "train", "scor")
    with pytest.raises(ConfigError, match="no artifact"):
        figure(result, "nobody", "score")


def test_a_reference_can_stand_for_a_node(tmp_path: Path, quick: Toy, store: Store) -> None:
    result, _ = quick()
    path = tmp_path / "from_store.yaml"
    path.write_text(
        f"stages: ['{TOY.parent}']\nnodes:\n  more: {{stage: slow, inputs: {{numbers: '@toy/train'}}}}\n"
    )
    made = Recorder(store, str(path)).run().pipeline.result().outcomes["more"].artifact
    assert made.record.inputs[0].id == result.outcomes["train"].artifact.id
    assert runner.explain(store, load(str(path)), "more")[0].startswith("more: in the store")


def test_a_node_on_its_own_takes_no_settings_of_others(quick: Toy, store: Store) -> None:
    quick()
    with pytest.raises(ConfigError, match=r"--set control\.steps=1: this builds train alone"):
        single.from_run(store, "toy", "train", ["control.steps=1"])
    assert single.from_run(store, "toy", "train", ["train.steps=9"]).nodes["train"].config.steps == 9
    assert single.from_run(store, "toy", "train", ["defaults.seed=9"]).nodes["train"].config.seed == 9


def test_a_cached_run_tidies_up_after_a_kill_just_after_publishing(quick: Toy, store: Store) -> None:
    result, _ = quick(stop=("left",))
    work = store.work(result.outcomes["left"].artifact.id)
    (work / "scratch").mkdir(parents=True)
    quick(stop=("left",))
    assert not work.exists()
