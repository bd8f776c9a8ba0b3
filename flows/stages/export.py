"""Export a checkpoint as a Hugging Face `deepseek_v3` folder with a model card and its provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from infra.artifact import Artifact
from infra.config import StageConfig
from infra.stage import InputSpec, Stage, StageContext


class ExportConfig(StageConfig):
    """The model's name, and how its weights are stored."""

    name: str = Field("headwater-demo", description="Model name on the card")
    max_shard_bytes: int = Field(5_000_000_000, gt=0, description="Largest weight file in bytes")
    weights: Literal["float32", "bfloat16", "fp8"] = Field(
        "float32", description="How weights are stored; fp8: E4M3 codes with a factor for each 128x128 block"
    )


def run(config: ExportConfig, context: StageContext) -> None:
    from data.chat import hf_tokenizer_config
    from flows.model_card import model_card
    from infra.files import atomic_write_json, atomic_write_text
    from model.checkpoint import load_model
    from model.hf import write_hf

    checkpoint = context.input("checkpoint")
    model = load_model(checkpoint.path)
    write_hf(
        model,
        context.out,
        checkpoint.file("tokenizer.json"),
        hf_tokenizer_config(model.config.max_position_embeddings),
        config.max_shard_bytes,
        config.weights,
    )
    evaluations = context.inputs_of("evaluations")
    atomic_write_text(context.out / "README.md", model_card(config.name, checkpoint, evaluations, model))
    files = sorted(path for path in context.out.iterdir() if path.is_file())
    context.metric("files", len(files))
    atomic_write_json(context.out / "logs" / "provenance.json", _provenance(config, checkpoint, files))
    for evaluation in evaluations:
        if any(ref.digest == checkpoint.digest for ref in evaluation.record.inputs):
            for name in ("pass_at_1", "format", "bits_per_byte"):
                if name in evaluation.metrics:
                    context.metric(name, evaluation.metrics[name])


def _provenance(config: ExportConfig, checkpoint: Artifact, files: list[Path]) -> dict[str, Any]:
    """An in-toto statement about the exported files: made by this stage from the checkpoint, and behind that
    all that the checkpoint's own statement lists."""
    from infra.config import split
    from infra.files import sha256_file
    from infra.provenance import statement
    from infra.store import open_store

    made = statement(open_store(checkpoint.path.parents[2]), checkpoint)
    source = f"urn:headwater:artifact:{checkpoint.stage}:{checkpoint.id}"
    built = made["predicate"]["buildDefinition"]
    behind = built["resolvedDependencies"]
    return {
        **made,
        "subject": [{"name": path.name, "digest": {"sha256": sha256_file(path)}} for path in files],
        "predicate": {
            "buildDefinition": {
                **built,
                "externalParameters": {
                    "stage": STAGE.name,
                    "version": STAGE.version,
                    "config": split(config)[0],
                    "inputs": [{"role": "checkpoint", "uri": source}],
                },
                "internalParameters": {},
                "resolvedDependencies": [{"uri": source, "digest": {"sha256": checkpoint.digest}}, *behind],
            },
            "runDetails": {"builder": made["predicate"]["runDetails"]["builder"]},
        },
    }


STAGE = Stage(
    name="export",
    version=1,
    config=ExportConfig,
    run=run,
    figures=("pass_at_1", "format", "bits_per_byte", "files"),
    inputs={
        "checkpoint": InputSpec(
            ("pretrain", "extend", "expert", "sft", "grpo"), description="Checkpoint to export"
        ),
        "evaluations": InputSpec(
            ("evaluate",), many=True, optional=True, description="Evaluations that the card quotes"
        ),
    },
)
