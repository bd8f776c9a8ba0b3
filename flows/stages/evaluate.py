"""Score a checkpoint: pass@1 on held-out problems with and without the system prompt, and held-out text."""

from __future__ import annotations

from pydantic import Field

from infra.config import ModelStageConfig
from infra.stage import InputSpec, Stage, StageContext


class EvaluateConfig(ModelStageConfig):
    """What is asked and how answers are sampled."""

    families: list[str] = Field(
        default_factory=list, description="Families to ask; empty: all that are reasoned about"
    )
    problems: int = Field(600, gt=0, description="Held-out problems, spread evenly over the families")
    samples: int = Field(1, gt=0, description="Responses a problem; pass@1 is their mean")
    temperature: float = Field(0.6, ge=0, description="Sampling temperature (0.6 in R1's evaluation)")
    max_tokens: int = Field(128, gt=0, description="Longest response in tokens")
    shown: int = Field(12, ge=0, description="Answers kept as samples to read")


def run(config: EvaluateConfig, context: StageContext) -> None:
    import math
    from dataclasses import asdict

    from data.chat import EOS, ChatTokenizer
    from data.loader import ShardLoader
    from flows.training import check_shards
    from infra.errors import HeadwaterError
    from model.checkpoint import load_model
    from model.device import pick_device
    from model.engine.engine import Engine
    from model.engine.sampling import Sampling
    from model.train import held_out_loss
    from post_training import problem_sets
    from post_training.evaluate import scores
    from post_training.rollout import sample
    from post_training.tasks.problem import SYSTEM

    checkpoint = context.input("checkpoint")
    tokenizer = ChatTokenizer(checkpoint.file("tokenizer.json"))
    model = load_model(checkpoint.path, device=pick_device(config.device))
    held = problem_sets.read_asked(context.input("problems").file("heldout.parquet"), config.families)
    by_family = problem_sets.spread(held, sorted({p.family for p in held}), config.problems)
    each = max(1, config.problems // len(by_family))
    for family, mine in by_family.items():
        if len(mine) < each:
            raise HeadwaterError(
                f"evaluate.problems is {config.problems}, which makes {each} of each of {len(by_family)} "
                f"families, but {len(mine)} held-out problems of {family} exist: raise held_out in the tasks "
                "stage, or ask for fewer"
            )
    asked = [problem for mine in by_family.values() for problem in mine]
    engine = Engine(model, [EOS])
    sampling = Sampling(config.max_tokens, config.temperature, seed=config.seed)
    table: dict[str, list[dict[str, float | str]]] = {}
    shown: dict[str, list[dict[str, str | bool]]] = {}
    for name, system in (("plain", ""), ("system", SYSTEM)):
        rollouts = sample(engine, tokenizer, asked, [system] * len(asked), sampling, config.samples)
        table[name] = [asdict(score) for score in scores(rollouts)]
        overall = table[name][0]
        suffix = "" if name == "plain" else "_system"
        context.metric(f"pass_at_1{suffix}", overall["passed"])
        context.metric(f"format{suffix}", overall["well_formed"])
        context.metric(f"reasoned{suffix}", overall["reasoned"])
        context.metric(f"response_tokens{suffix}", overall["tokens"])
        # Evenly over all, ordered so that neighbours are of different families.
        each = (config.shown + 1) // 2
        spaced = rollouts[:: max(1, len(rollouts) // max(1, each))][:each]
        shown[name] = [
            {
                "prompt": r.problem.prompt,
                "system": r.system,
                "answer": tokenizer.decode(r.response_ids, keep_specials=True),
                "expected": r.problem.answer,
                "correct": r.verdict.correct,
            }
            for r in spaced[::2] + spaced[1::2]
        ]
    for score in table["plain"][1:]:
        context.metric(f"pass_at_1_{score['family']}", score["passed"])
    context.metric("responses", len(asked) * config.samples)
    for shards in context.inputs_of("shards"):
        check_shards(shards, set(), model.config.vocab_size)
        source = ShardLoader(shards.folder("heldout"), 1, config.seed)
        loss, targets = held_out_loss(model, source, source.rows)
        context.metric("text_loss", loss)
        size = shards.json("stats.json")["heldout"]["bytes"]
        context.metric("bits_per_byte", loss * targets / math.log(2) / size)
    context.write_json("scores.json", table)
    pairs = zip(shown["plain"], shown["system"], strict=True)
    context.write_json("samples.json", [one for pair in pairs for one in pair][: config.shown])


_CHECKPOINTS = ("pretrain", "extend", "expert", "sft", "grpo")

STAGE = Stage(
    name="evaluate",
    version=1,
    config=EvaluateConfig,
    run=run,
    figures=("pass_at_1", "pass_at_1_system", "reasoned", "format"),
    inputs={
        "checkpoint": InputSpec(_CHECKPOINTS, description="Checkpoint to score"),
        "problems": InputSpec(("tasks",), description="Held-out problems"),
        "shards": InputSpec(("pack",), optional=True, description="Shards whose held-out text is scored"),
    },
)
