"""Train a reward model from the SFT checkpoint on pairs of its own right and wrong responses."""

from __future__ import annotations

from pydantic import Field

from infra.config import ModelStageConfig, placement
from infra.stage import InputSpec, Stage, StageContext


class RewardConfig(ModelStageConfig):
    """Where pairs come from and how long the model learns from them."""

    problems: int = Field(300, gt=0, description="Problems sampled for pairs")
    samples: int = Field(4, gt=1, description="Responses a problem")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature")
    max_tokens: int = Field(128, gt=0, description="Longest response in tokens")
    held_out_share: float = Field(0.15, gt=0, lt=1, description="Share of problems whose pairs only measure")
    steps: int = Field(40, gt=0, description="Optimizer steps")
    batch_pairs: int = Field(32, gt=0, description="Pairs a step")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate")
    checkpoint_every: int = placement(20, gt=0, description="Steps between checkpoints")


def run(config: RewardConfig, context: StageContext) -> None:
    import random

    from data.chat import EOS, ChatTokenizer
    from flows.training import checkpoint_metrics, copy_tokenizer, progress, publish_training
    from infra.checkpoint import Checkpoints
    from infra.errors import HeadwaterError
    from model.checkpoint import load_model
    from model.device import pick_device
    from model.engine.engine import Engine
    from model.engine.sampling import Sampling
    from model.optim.build import OptimizerConfig
    from post_training import problem_sets
    from post_training.reward import Pair, RewardModel, accuracy, pairs_of, save_reward_model, train_reward
    from post_training.rollout import sample
    from post_training.tasks.problem import SYSTEM, is_held_out

    policy = context.input("policy")
    tokenizer = ChatTokenizer(policy.file("tokenizer.json"))
    problems = problem_sets.read_asked(context.input("problems").file("train.parquet"))
    rng = random.Random(f"{config.seed}/reward")
    rng.shuffle(problems)
    problems = problems[: config.problems]
    systems = [SYSTEM if rng.random() < 0.5 else "" for _ in problems]
    device = pick_device(config.device)
    engine = Engine(load_model(policy.path, device=device), [EOS])
    sampling = Sampling(config.max_tokens, config.temperature, seed=config.seed)
    rollouts = sample(engine, tokenizer, problems, systems, sampling, config.samples)
    pairs: list[Pair] = []
    held: list[Pair] = []
    for start in range(0, len(rollouts), config.samples):
        group = rollouts[start : start + config.samples]
        # Another salt than the split of problems: these are all training problems.
        target = held if is_held_out(group[0].problem, config.held_out_share, "reward") else pairs
        target += pairs_of(group)
    correct = sum(rollout.verdict.correct for rollout in rollouts)
    if not pairs or not held:
        raise HeadwaterError(
            f"reward: {len(pairs)} training and {len(held)} held-out pairs of a right and a wrong response, "
            f"from {correct} right ones of {len(rollouts)}. Raise reward.problems, reward.samples or "
            "reward.temperature, or train the policy to be right sometimes and not always"
        )
    context.log(f"{len(pairs)} pairs to learn from, {len(held)} held out")
    model = RewardModel(load_model(policy.path, device=device))
    log_file = context.scratch / "metrics.jsonl"
    position = train_reward(
        model,
        pairs,
        OptimizerConfig(lr=config.lr, weight_decay=0.0),
        config.steps,
        config.batch_pairs,
        config.seed,
        Checkpoints(context.scratch / "checkpoints", log=context.log),
        log_file,
        progress(context, lambda position: position.step, config.steps),
        config.checkpoint_every,
    )
    save_reward_model(model, context.out)
    copy_tokenizer(policy.file("tokenizer.json"), context)
    sampled = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
    context.metric("token_passes", float(sampled + 3 * position.tokens))
    context.metric("pairs", len(pairs))
    context.metric("held_out_pairs", len(held))
    context.metric("held_out_accuracy", accuracy(model, held))
    checkpoint_metrics(context, model)
    publish_training(context, log_file, unit="nats per pair")


STAGE = Stage(
    name="reward",
    version=1,
    config=RewardConfig,
    run=run,
    figures=("held_out_accuracy", "pairs", "held_out_pairs"),
    inputs={
        "policy": InputSpec(
            ("sft", "grpo", "expert"), description="Checkpoint that is sampled and started from"
        ),
        "problems": InputSpec(("tasks",), description="Problems to sample on"),
    },
)
