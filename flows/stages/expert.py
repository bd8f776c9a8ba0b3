"""Train one domain's expert: SFT on worked solutions in two forms, then GRPO with the domain's verifier."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.config import ModelStageConfig, placement
from infra.stage import InputSpec, Stage, StageContext


class ExpertConfig(ModelStageConfig):
    """The domain, and how its expert learns it (report §5.1)."""

    families: list[str] = Field(
        default_factory=lambda: ["addition"], min_length=1, description="Families of the domain"
    )
    problems: int = Field(1000, gt=0, description="Problems used for SFT, spread evenly over the families")
    direct_share: float = Field(
        0.6, ge=0, le=1, description="Share of samples without the system prompt that answer at once"
    )
    epochs: float = Field(1.0, gt=0, description="Passes of SFT")
    batch_rows: int = Field(16, gt=0, description="Packed rows an SFT step")
    sequence_length: int = Field(256, gt=1, description="Tokens a row")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="adamw, or muon (SFT only)")
    sft_lr: float = Field(5e-4, gt=0, description="Peak learning rate of SFT")
    muon_lr: float = Field(2e-3, gt=0, description="Peak learning rate of SFT for Muon's parameters")
    rl_steps: int = Field(20, ge=0, description="Batches of rollouts")
    rl_lr: float = Field(1e-4, gt=0, description="Learning rate of GRPO")
    groups: int = Field(8, gt=0, description="Problems a step of GRPO")
    group_size: int = Field(8, gt=1, description="Responses a problem")
    beta: float = Field(0.02, ge=0, description="Weight of the KL divergence to the SFT checkpoint")
    clip: float = Field(0.2, gt=0, description="Clip of the probability ratio")
    format_weight: float = Field(0.1, ge=0, description="Reward of a well-formed response")
    system_share: float = Field(1.0, ge=0, le=1, description="Share of groups asked with the system prompt")
    max_tokens: int = Field(128, gt=0, description="Longest response in tokens")
    checkpoint_every: int = placement(25, gt=0, description="Steps between checkpoints")


def run(config: ExpertConfig, context: StageContext) -> None:
    import copy
    import random

    from data.chat import ChatTokenizer
    from flows.training import checkpoint_metrics, copy_tokenizer, progress, publish_rl, publish_training
    from infra.checkpoint import Checkpoints
    from infra.errors import HeadwaterError
    from model.checkpoint import load_model, save_model
    from model.device import pick_device
    from model.optim.build import OptimizerConfig, build_optimizer
    from post_training import problem_sets
    from post_training.grpo import GRPOConfig
    from post_training.reinforce import RLConfig, optimize
    from post_training.rewards import rule_rewards
    from post_training.sft import Conversation, PackedSamples, SFTConfig, fine_tune
    from post_training.tasks.problem import SYSTEM

    base = context.input("base")
    tokenizer = ChatTokenizer(base.file("tokenizer.json"))
    problems = problem_sets.read(context.input("problems").file("train.parquet"), config.families)
    if len(set(config.families)) < len(config.families):
        raise HeadwaterError(f"expert.families names a family twice: {', '.join(config.families)}")
    rng = random.Random(f"{config.seed}/expert")
    rng.shuffle(problems)
    taught: list[Conversation] = []
    for mine in problem_sets.spread(problems, config.families, config.problems).values():
        for p in mine:
            direct = rng.random() < config.direct_share
            taught.append(Conversation(p.prompt, "" if direct else p.thought, p.boxed))
            # Without a thought to show, the prompt that asks for one would teach to ignore it.
            if p.thought:
                taught.append(Conversation(p.prompt, p.thought, p.boxed, SYSTEM))
    packed = PackedSamples(tokenizer, taught, config.sequence_length, config.seed)
    context.log(f"{len(taught)} samples in {packed.count} rows, {packed.left_out} too long and left out")
    model = load_model(base.path, device=pick_device(config.device))
    settings = OptimizerConfig(
        name=config.optimizer, lr=config.sft_lr, muon_lr=config.muon_lr, weight_decay=0.0
    )
    sft_log = context.scratch / "sft.jsonl"
    sft = SFTConfig(config.epochs, config.batch_rows)
    total = sft.steps(packed.count)
    fine_tune(
        model,
        build_optimizer(model, settings),
        packed,
        sft,
        Checkpoints(context.scratch / "sft", log=context.log),
        sft_log,
        progress(context, lambda position: position.step, total),
        config.checkpoint_every,
    )
    publish_training(context, sft_log, "sft")
    if config.rl_steps:
        rl_log = context.scratch / "rl.jsonl"
        position = optimize(
            model,
            copy.deepcopy(model).eval(),
            build_optimizer(model, OptimizerConfig(name="adamw", lr=config.rl_lr, weight_decay=0.0)),
            tokenizer,
            problems,
            lambda rollouts: rule_rewards(rollouts, config.format_weight),
            GRPOConfig(config.groups, config.group_size, config.clip, config.beta),
            RLConfig(
                config.rl_steps,
                max_tokens=config.max_tokens,
                system_share=config.system_share,
                checkpoint_every=config.checkpoint_every,
            ),
            config.seed,
            SYSTEM,
            Checkpoints(context.scratch / "rl", log=context.log),
            rl_log,
            progress(context, lambda position: position.step, config.rl_steps),
        )
        publish_rl(context, rl_log, position)
    save_model(model, context.out)
    copy_tokenizer(base.file("tokenizer.json"), context)
    context.write_json("expert.json", {"families": config.families})
    context.metric("families", ", ".join(config.families))
    context.metric("left_out", packed.left_out)
    checkpoint_metrics(context, model)


STAGE = Stage(
    name="expert",
    version=1,
    config=ExpertConfig,
    run=run,
    figures=("families", "left_out", "rl_steps", "parameters"),
    inputs={
        "base": InputSpec(("extend", "pretrain", "sft"), description="Checkpoint to start from"),
        "problems": InputSpec(("tasks",), description="Problems with worked solutions"),
    },
)
