"""The model card: its header is what the hub reads, and says what the records know."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from flows.model_card import model_card
from flows.stages import ingest
from infra.build import build
from infra.config import StageConfig
from infra.stage import InputSpec, Stage, StageContext
from infra.store import Store

MODEL: Any = SimpleNamespace(
    config=SimpleNamespace(
        num_hidden_layers=2,
        hidden_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        vocab_size=16,
        max_position_embeddings=32,
    )
)


def train(config: StageConfig, context: StageContext) -> None:
    context.write_json("model.json", [])


TRAIN = Stage("train", 1, StageConfig, train, inputs={"documents": InputSpec(("ingest",))})


def test_the_card_names_sources_and_licences(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"A tale of {i} ships and of the sea they sailed. " * 20)
    config = ingest.IngestConfig(sources=str(folder), licence="CC0-1.0")
    corpus = build(store, ingest.STAGE, config, {}).artifact
    checkpoint = build(store, TRAIN, StageConfig(), {"documents": [corpus]}).artifact
    text = model_card("ours", checkpoint, [], MODEL)
    header = yaml.safe_load(text.split("---\n")[1])
    assert "| folder | 3 | CC0-1.0 |" in text
    assert str(tmp_path) not in text, "where it lay is nobody's business"
    assert not {"license", "base_model", "datasets"} & set(header)
    shutil.rmtree(corpus.path)
    text = model_card("ours", checkpoint, [], MODEL)
    assert "## Training data\n\nNot known.\n" in text


def test_data_sets_of_the_hub_are_in_the_header(store: Store) -> None:
    def empty(config: ingest.IngestConfig, context: StageContext) -> None:
        context.write_json("stats.json", {})

    config = ingest.IngestConfig(sources="stdlib,datasets:some/tales, datasets:./mine,datasets:more")
    corpus = build(store, Stage("ingest", 1, ingest.IngestConfig, empty), config, {}).artifact
    checkpoint = build(store, TRAIN, StageConfig(), {"documents": [corpus]}).artifact
    header = yaml.safe_load(model_card("ours", checkpoint, [], MODEL).split("---\n")[1])
    assert header["datasets"] == ["more", "some/tales"]
