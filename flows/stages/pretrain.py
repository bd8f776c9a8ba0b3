"""Pretrain the base model: MLA, DeepSeekMoE and MTP on packed shards, the report's schedules scaled to the
run."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from infra.config import ModelStageConfig, placement
from infra.stage import InputSpec, Stage, StageContext
from model.config import ModelConfig


class PretrainConfig(ModelStageConfig):
    """The model, how long it trains, and on what schedule."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="Architecture")
    tokens: int = Field(2_400_000, gt=0, description="Tokens to train on; the schedule is scaled to them")
    batch_rows: int = Field(16, gt=0, description="Sequences a step at full batch size")
    micro_rows: int = Field(
        4, gt=0, description="Sequences of a micro-batch; its size decides how gradient sums are rounded"
    )
    batch_ramp: bool = Field(True, description="Ramp the batch size up over the first 3.2% of the tokens")
    warmup: float = Field(0.03, gt=0, lt=1, description="Learning-rate warmup, as a share of the tokens")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="adamw as in the report, or muon")
    lr: float = Field(2.2e-4, gt=0, description="Peak learning rate of AdamW's parameters")
    muon_lr: float = Field(8e-3, gt=0, description="Peak learning rate of Muon's parameters")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's weight decay")
    moments: Literal["fp32", "bf16"] = Field(
        "fp32", description="Format of AdamW's moments; bf16 as in the report halves the optimizer's memory"
    )
    clip: float = Field(1.0, gt=0, description="Largest gradient norm")
    bias_speed: float = Field(0.001, ge=0, description="Gamma: step of the routing bias a training step")
    balance_weight: float = Field(1e-4, ge=0, description="Alpha: weight of the sequence-wise balance loss")
    precision: Literal["fp32", "bf16", "fp8"] = Field("fp32", description="Format of the large products")
    spike: float = Field(
        0.0,
        ge=0,
        description="Standard deviations above the last losses from which a step is left out; 0 = never, but "
        "for a loss that is no number",
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of an average of the weights, kept to preview them; 0 = none"
    )
    recompute: bool = placement(
        False, description="Make norms, SwiGLU and MLA's up-projections again going back: less memory"
    )
    checkpoint_every: int = placement(100, gt=0, description="Steps between checkpoints")
    watch_rows: int = placement(32, ge=0, description="Held-out rows measured at each checkpoint")


def run(config: PretrainConfig, context: StageContext) -> None:
    import math

    import torch

    from data.loader import ShardLoader
    from flows.training import (
        check_shards,
        checkpoint_metrics,
        copy_tokenizer,
        progress,
        publish_training,
    )
    from infra.checkpoint import Checkpoints
    from infra.errors import HeadwaterError
    from model.checkpoint import save_model
    from model.device import pick_device
    from model.ema import EMA
    from model.guard import GuardConfig
    from model.optim.build import OptimizerConfig, build_optimizer
    from model.schedule import Schedule
    from model.train import LoopConfig, Position, Step, held_out_loss, train
    from model.transformer import build

    shards, tokenizer = context.input("shards"), context.input("tokenizer")
    source = ShardLoader(shards.folder("train"), config.batch_rows, config.seed)
    held_out = ShardLoader(shards.folder("heldout"), 1, config.seed)
    check_shards(shards, {tokenizer.digest}, config.model.vocab_size)
    if source.sequence_length > config.model.original_max_position_embeddings:
        raise HeadwaterError(
            f"rows of {source.sequence_length} tokens do not fit "
            f"model.original_max_position_embeddings = {config.model.original_max_position_embeddings}"
        )
    # Drawn on the CPU, so that the first weights are the same wherever it trains.
    if source.sequence_length <= config.model.num_nextn_predict_layers + 1:
        raise HeadwaterError(
            f"rows of {source.sequence_length} tokens are too short for model.num_nextn_predict_layers = "
            f"{config.model.num_nextn_predict_layers}: each predicts one token further on"
        )
    model = build(config.model, config.seed, config.precision).to(pick_device(config.device))
    optimizer = build_optimizer(
        model,
        OptimizerConfig(
            name=config.optimizer,
            lr=config.lr,
            muon_lr=config.muon_lr,
            weight_decay=config.weight_decay,
            clip=config.clip,
            moments=config.moments,
        ),
    )
    scaled = Schedule.scaled(config.tokens, config.warmup * config.tokens, bias_speed=config.bias_speed)
    if not config.batch_ramp:
        scaled = replace(scaled, batch_ramp=0.0)
    mtp = config.model.num_nextn_predict_layers > 0
    length = source.sequence_length

    def schedule(position: Position) -> Step | None:
        if position.tokens >= config.tokens:
            return None
        rows = max(1, math.floor(config.batch_rows * scaled.batch_share(position.tokens)))
        # The rise starts after the first step, or that step would be thrown away.
        middle = position.tokens + rows * length / 2
        return Step(
            rows,
            scaled.lr_scale(middle),
            scaled.mtp(position.tokens) if mtp else 0.0,
            scaled.expert_bias_speed(position.tokens),
        )

    def watch(position: Position) -> dict[str, float]:
        rows = min(config.watch_rows, held_out.rows)
        if not rows:
            return {}
        figures = {"watched_loss": held_out_loss(model, held_out, rows)[0]}
        if ema is not None:
            with ema.in_place():
                figures["watched_loss_ema"] = held_out_loss(model, held_out, rows)[0]
        return figures

    loop = LoopConfig(
        config.balance_weight,
        config.micro_rows,
        lanes=torch.get_num_threads(),
        mask_documents=False,
        checkpoint_every=config.checkpoint_every,
        recompute=config.recompute,
        guard=GuardConfig(spike=config.spike),
    )
    ema = EMA(model, config.ema) if config.ema else None
    log_file = context.scratch / "metrics.jsonl"
    checkpoints = Checkpoints(context.scratch / "checkpoints", log=context.log)
    train(
        model,
        optimizer,
        source,
        schedule,
        loop,
        checkpoints,
        log_file,
        progress(context, lambda position: position.tokens, config.tokens),
        watch,
        ema,
    )
    save_model(model, context.out)
    copy_tokenizer(tokenizer.file("tokenizer.json"), context)
    loss, targets = held_out_loss(model, held_out, held_out.rows)
    if ema is not None:
        with ema.in_place():
            context.metric("held_out_loss_ema", held_out_loss(model, held_out, held_out.rows)[0])
        ema.close()
    held = shards.json("stats.json")["heldout"]
    context.metric("held_out_loss", loss)
    context.metric("held_out_bits_per_byte", loss * targets / math.log(2) / held["bytes"])
    context.metric("bigram_bits_per_byte", shards.metrics["bigram_bits_per_byte"])
    checkpoint_metrics(context, model)
    publish_training(context, log_file)


STAGE = Stage(
    name="pretrain",
    version=1,
    config=PretrainConfig,
    run=run,
    figures=("held_out_loss", "held_out_bits_per_byte", "bigram_bits_per_byte", "parameters"),
    inputs={
        "shards": InputSpec(("pack",), description="Packed token shards"),
        "tokenizer": InputSpec(("tokenizer",), description="The tokenizer that the shards were made with"),
    },
)
