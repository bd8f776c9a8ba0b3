"""What a stage is given and what it may not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import faults
from infra.artifact import Artifact
from infra.build import build
from infra.config import StageConfig
from infra.errors import BuildError, ConfigError, HeadwaterError
from infra.faults import POINTS
from infra.stage import InputSpec, SourceFile, Stage, StageContext
from infra.store import Store
from tests.infra.toys import TRAIN, TrainConfig


def toy(run: Callable[[Any, StageContext], None], **changes: Any) -> Stage:
    """A stage made of one function."""
    return replace(Stage("toy", 1, StageConfig, run), **changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "train: input 'words' is missing; give an artifact of words"),
        ({"words": ["w"], "wordz": ["w"]}, "train: it has no input 'wordz'; did you mean words?"),
        ({"words": ["w"], "base": ["w"]}, "train: input 'base' takes an artifact of train, not words@"),
        ({"words": ["w"], "base": ["t", "t"]}, "train: input 'base' takes one artifact, not 2"),
    ],
)
def test_inputs_that_do_not_fit(
    inputs: dict[str, list[str]], message: str, store: Store, words: Artifact
) -> None:
    trained = build(store, TRAIN, TrainConfig(steps=1), {"words": [words]}).artifact
    given = {role: [{"w": words, "t": trained}[one] for one in many] for role, many in inputs.items()}
    with pytest.raises(BuildError) as caught:
        build(store, TRAIN, TrainConfig(), given)
    assert message in str(caught.value)


def test_inputs_by_role(store: Store, words: Artifact) -> None:
    seen: dict[str, Any] = {}

    def run(config: StageConfig, context: StageContext) -> None:
        seen["many"] = [one.ref for one in context.inputs_of("many")]
        seen["none"] = context.inputs_of("none")
        for role in ("many", "none"):
            with pytest.raises(BuildError, match=f"input '{role}': exactly one artifact is needed"):
                context.input(role)
        seen["one"] = context.input("one").ref
        context.write_json("x.json", 1)

    roles = {
        "many": InputSpec(("words",), many=True),
        "one": InputSpec(("words",)),
        "none": InputSpec(("words",), optional=True),
    }
    build(store, toy(run, inputs=roles), StageConfig(), {"many": [words, words], "one": [words]})
    assert seen == {"many": [words.ref] * 2, "none": (), "one": words.ref}


def test_what_a_stage_may_not_publish(store: Store, tmp_path: Path) -> None:
    def nothing(config: StageConfig, context: StageContext) -> None:
        (context.out / "logs").mkdir()
        (context.out / "logs" / "only.txt").write_text("x")

    def record(config: StageConfig, context: StageContext) -> None:
        context.write_json("record.json", {})

    def link(config: StageConfig, context: StageContext) -> None:
        (context.out / "link").symlink_to(tmp_path)

    def sources(config: StageConfig, context: StageContext) -> None:
        context.write_json("sources.json", {})

    for run, message in (
        (nothing, "it finished without writing any file under out/"),
        (record, "it wrote a record.json of its own"),
        (link, "a payload may hold plain files and folders only"),
    ):
        with pytest.raises(HeadwaterError, match=message):
            build(store, toy(run), StageConfig(), {}, refresh=True)
    scanning = toy(sources, scan=lambda config: [SourceFile("a", 1, "0")])
    with pytest.raises(BuildError, match=r"sources\.json is the scan's own file"):
        build(store, scanning, StageConfig(), {})
    assert store.refs() == []


def test_figures(store: Store) -> None:
    import numpy as np
    import torch

    def run(config: StageConfig, context: StageContext) -> None:
        context.metric("numpy", np.float32(0.5))
        context.metric("torch", torch.tensor(3))
        context.metric("text", "yes")
        context.metric("truth", np.bool_(True))
        for bad in (float("nan"), torch.tensor(float("inf")), [1], None):
            with pytest.raises(BuildError, match="metric 'bad'"):
                context.metric("bad", bad)
        with pytest.raises(BuildError, match="timing 'bad': expected a number"):
            context.timing("bad", "fast")
        context.timing("rate", 3)
        context.write_json("x.json", 1)

    record = build(store, toy(run), StageConfig(), {}).artifact.record
    assert record.metrics == {"numpy": 0.5, "torch": 3, "text": "yes", "truth": True}
    assert record.timings["rate"] == 3.0


def armed_elsewhere(context: StageContext) -> None:
    """Pass a point that is not registered while another is armed."""
    faults.arm(POINTS[0])
    try:
        context.fault("nowhere")
    finally:
        faults.disarm()


def test_the_fault_points_of_a_context_are_the_registered_ones(store: Store) -> None:
    def run(config: StageConfig, context: StageContext) -> None:
        for point in POINTS:
            context.fault(point)
        with pytest.raises(ConfigError, match="unregistered"):
            armed_elsewhere(context)
        context.write_json("x.json", 1)

    assert build(store, toy(run), StageConfig(), {}).status == "built"


def test_bad_stage_names_are_refused() -> None:
    for name in ("", "Words", "a-b", "../x", "a@b", "1a"):
        with pytest.raises(HeadwaterError, match="use lower-case letters"):
            Stage(name, 1, StageConfig, lambda config, context: None)
