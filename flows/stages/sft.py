"""Fine-tune on conversations: packed with a sample mask, responses only, cosine learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.config import ModelStageConfig, placement
from infra.stage import InputSpec, Stage, StageContext


class SFTStageConfig(ModelStageConfig):
    """Passes, learning rates and rows."""

    epochs: float = Field(2.0, gt=0, description="Passes over the samples (2 in the report)")
    batch_rows: int = Field(16, gt=0, description="Packed rows a step")
    sequence_length: int = Field(
        256, gt=1, description="Tokens a row; longer samples are left out and counted"
    )
    warmup: int = Field(10, ge=0, description="Steps of linear warmup")
    lr: float = Field(5e-6, gt=0, description="Peak learning rate of AdamW's parameters")
    floor: float = Field(0.2, ge=0, le=1, description="Last learning rate over the peak")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="adamw as in the report, or muon")
    muon_lr: float = Field(2e-3, gt=0, description="Peak learning rate of Muon's parameters")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    direct_families: list[str] = Field(
        default_factory=list,
        description="Families whose known answers join as direct samples (those without reasoning)",
    )
    prompt_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of reasoned samples shown without their system prompt, so that reasoning unasked "
        "is common enough for reinforcement learning to find",
    )
    checkpoint_every: int = placement(25, gt=0, description="Steps between checkpoints")


def run(config: SFTStageConfig, context: StageContext) -> None:
    from data.chat import ChatTokenizer
    from flows.training import checkpoint_metrics, copy_tokenizer, progress, publish_training
    from infra.checkpoint import Checkpoints
    from infra.errors import HeadwaterError, nearest
    from model.checkpoint import load_model, save_model
    from model.device import pick_device
    from model.optim.build import OptimizerConfig, build_optimizer
    from post_training import problem_sets
    from post_training.samples import read_samples
    from post_training.sft import Conversation, PackedSamples, SFTConfig, drop_prompts, fine_tune

    base = context.input("base")
    tokenizer = ChatTokenizer(base.file("tokenizer.json"))
    samples: list[Conversation] = []
    for artifact in context.inputs_of("samples"):
        samples += drop_prompts(
            read_samples(artifact.file("samples.parquet")), config.prompt_dropout, config.seed
        )
    problems = [p for a in context.inputs_of("problems") for p in problem_sets.read(a.file("train.parquet"))]
    for family in config.direct_families:
        direct = [Conversation(p.prompt, "", p.boxed) for p in problems if p.family == family]
        if not direct:
            raise HeadwaterError(
                f"sft.direct_families names {family!r}, of which the problems input holds none; "
                f"{nearest(family, {p.family for p in problems})}"
            )
        samples += direct
    if not samples:
        raise HeadwaterError(
            "sft: no samples; give it a distill artifact, or problems and sft.direct_families"
        )
    packed = PackedSamples(tokenizer, samples, config.sequence_length, config.seed)
    context.log(f"{len(samples)} samples in {packed.count} rows, {packed.left_out} too long and left out")
    model = load_model(base.path, device=pick_device(config.device))
    optimizer = build_optimizer(
        model,
        OptimizerConfig(
            name=config.optimizer, lr=config.lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay
        ),
    )
    log_file = context.scratch / "metrics.jsonl"
    sft = SFTConfig(config.epochs, config.batch_rows, warmup=config.warmup, floor=config.floor)
    position = fine_tune(
        model,
        optimizer,
        packed,
        sft,
        Checkpoints(context.scratch / "checkpoints", log=context.log),
        log_file,
        progress(context, lambda position: position.step, sft.steps(packed.count)),
        config.checkpoint_every,
    )
    save_model(model, context.out)
    copy_tokenizer(base.file("tokenizer.json"), context)
    context.metric("samples", len(samples))
    context.metric("left_out", packed.left_out)
    context.metric("steps", position.step)
    context.metric("tokens", position.tokens)
    # A forward pass and twice that going back: the unit in which equal compute is compared.
    context.metric("token_passes", 3.0 * position.tokens)
    checkpoint_metrics(context, model)
    publish_training(context, log_file)


STAGE = Stage(
    name="sft",
    version=1,
    config=SFTStageConfig,
    run=run,
    figures=("samples", "steps", "tokens", "left_out"),
    inputs={
        "base": InputSpec(
            ("extend", "pretrain", "sft", "grpo", "expert"), description="Checkpoint to start from"
        ),
        "samples": InputSpec(
            ("distill",), many=True, optional=True, description="Rejection-sampled responses"
        ),
        "problems": InputSpec(
            ("tasks",), many=True, optional=True, description="Problems whose known answers join as samples"
        ),
    },
)
