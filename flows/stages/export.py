"""Export a checkpoint as a Hugging Face `deepseek_v3` folder with a model card and its provenance."""

from __future__ import annotations

from pydantic import Field

from infra.config import StageConfig
from infra.stage import InputSpec, Stage, StageContext


class ExportConfig(StageConfig):
    """The folder's name and the size of its files."""

    name: str = Field("headwater-demo", description="Model name on the card")
    max_shard_bytes: int = Field(5_000_000_000, gt=0, description="Largest weight file in bytes")


def run(config: ExportConfig, context: StageContext) -> None:
    from data.chat import hf_tokenizer_config
    from flows.model_card import model_card
    from infra.files import atomic_write_json
    from infra.provenance import statement
    from infra.store import open_store
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
    )
    evaluations = context.inputs_of("evaluations")
    (context.out / "README.md").write_text(model_card(config.name, checkpoint, evaluations, model))
    home = checkpoint.path.parents[2]
    atomic_write_json(context.out / "logs" / "provenance.json", statement(open_store(home), checkpoint))
    context.metric("files", len(list(context.out.iterdir())))
    for evaluation in evaluations:
        if any(ref.digest == checkpoint.digest for ref in evaluation.record.inputs):
            for name in ("pass_at_1", "format", "bits_per_byte"):
                if name in evaluation.metrics:
                    context.metric(name, evaluation.metrics[name])


STAGE = Stage(
    name="export",
    version=1,
    config=ExportConfig,
    run=run,
    inputs={
        "checkpoint": InputSpec(
            ("pretrain", "extend", "expert", "sft", "grpo"), description="Checkpoint to export"
        ),
        "evaluations": InputSpec(
            ("evaluate",), many=True, optional=True, description="Evaluations that the card quotes"
        ),
    },
)
