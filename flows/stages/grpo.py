"""Reinforce the SFT checkpoint with GRPO: rule-based verifiers, and a reward model beside them if there is
one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from infra.config import ModelStageConfig, placement
from infra.stage import InputSpec, Stage, StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from post_training.rollout import Rollout


class GRPOStageConfig(ModelStageConfig):
    """Rollouts, objective and rewards."""

    families: list[str] = Field(
        default_factory=list, description="Families to ask, in equal shares; empty: all that are reasoned"
    )
    steps: int = Field(90, gt=0, description="Batches of rollouts")
    groups: int = Field(16, gt=0, description="Problems a step")
    group_size: int = Field(8, gt=1, description="Responses a problem")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the objective scores at 1")
    max_tokens: int = Field(128, gt=0, description="Longest response in tokens")
    lr: float = Field(1e-6, gt=0, description="Learning rate of AdamW")
    beta: float = Field(0.02, ge=0, description="Weight of the KL divergence to the SFT checkpoint")
    clip: float = Field(0.2, gt=0, description="Clip of the probability ratio")
    updates: int = Field(1, gt=0, description="Optimizer steps a batch of rollouts")
    min_spread: float = Field(
        0.0,
        ge=0,
        description="Least deviation that advantages are divided by; 0.1 keeps a reward model's small "
        "differences small where the rules see none",
    )
    format_weight: float = Field(0.1, ge=0, description="Reward of a well-formed response")
    reward_model_weight: float = Field(
        0.1, ge=0, description="Weight of the reward model's score, if one is given"
    )
    system_share: float = Field(0.0, ge=0, le=1, description="Share of groups asked with the system prompt")
    micro_tokens: int = Field(
        8192,
        gt=0,
        description="Tokens whose activations are held at once; decides how gradient sums are rounded",
    )
    checkpoint_every: int = placement(10, gt=0, description="Steps between checkpoints")


def run(config: GRPOStageConfig, context: StageContext) -> None:
    from data.chat import ChatTokenizer
    from flows.training import checkpoint_metrics, copy_tokenizer, progress, publish_rl
    from infra.checkpoint import Checkpoints
    from infra.errors import HeadwaterError
    from infra.files import sha256_file
    from model.checkpoint import load_model, save_model
    from model.device import pick_device
    from model.optim.build import OptimizerConfig, build_optimizer
    from post_training import problem_sets
    from post_training.grpo import GRPOConfig
    from post_training.reinforce import RLConfig, optimize
    from post_training.reward import load_reward_model
    from post_training.rewards import model_rewards, rule_rewards
    from post_training.tasks.problem import SYSTEM

    policy = context.input("policy")
    tokenizer = ChatTokenizer(policy.file("tokenizer.json"))
    problems = problem_sets.read_asked(context.input("problems").file("train.parquet"), config.families)
    for artifact in context.inputs_of("reward"):
        if sha256_file(artifact.file("tokenizer.json")) != sha256_file(policy.file("tokenizer.json")):
            raise HeadwaterError(
                f"{artifact.ref} reads another tokenizer than {policy.ref} writes: train the reward model "
                "from a checkpoint of the same chain"
            )
    device = pick_device(config.device)
    judges = [load_reward_model(artifact.path, device) for artifact in context.inputs_of("reward")]

    def reward(rollouts: Sequence[Rollout]) -> Tensor:
        total = rule_rewards(rollouts, config.format_weight)
        for judge in judges:
            total = total + config.reward_model_weight * model_rewards(judge, rollouts)
        return total

    model = load_model(policy.path, device=device)
    log_file = context.scratch / "rl.jsonl"
    position = optimize(
        model,
        load_model(policy.path, device=device).eval(),
        build_optimizer(model, OptimizerConfig(name="adamw", lr=config.lr, weight_decay=0.0)),
        tokenizer,
        problems,
        reward,
        GRPOConfig(
            config.groups,
            config.group_size,
            config.clip,
            config.beta,
            config.updates,
            config.min_spread,
            config.micro_tokens,
        ),
        RLConfig(
            config.steps, config.temperature, config.max_tokens, config.system_share, config.checkpoint_every
        ),
        config.seed,
        SYSTEM,
        Checkpoints(context.scratch / "checkpoints", log=context.log),
        log_file,
        progress(context, lambda position: position.step, config.steps, every=5),
    )
    save_model(model, context.out)
    copy_tokenizer(policy.file("tokenizer.json"), context)
    checkpoint_metrics(context, model)
    publish_rl(context, log_file, position)
    # A pass each of rollout and reference, three of forward and backward an update, one of the reward model.
    # A group reads its prompt once and is charged for each response's: the comparison favours the control.
    passes = 2 + (1 if config.updates > 1 else 0) + 3 * config.updates + len(judges)
    context.metric("token_passes", float(passes * position.tokens))


STAGE = Stage(
    name="grpo",
    version=1,
    config=GRPOStageConfig,
    run=run,
    figures=("rl_steps", "sequence_tokens", "token_passes", "parameters"),
    inputs={
        "policy": InputSpec(
            ("sft", "grpo", "expert"), description="Checkpoint to reinforce, and the reference"
        ),
        "problems": InputSpec(("tasks",), description="Problems with verifiable answers"),
        "reward": InputSpec(("reward",), optional=True, description="Reward model beside the rules"),
    },
)
