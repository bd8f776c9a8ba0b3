"""Distil experts into fine-tuning data: two forms a problem, rejection-sampled by verifiers."""

from __future__ import annotations

from pydantic import Field

from infra.config import ModelStageConfig
from infra.stage import InputSpec, Stage, StageContext


class DistillConfig(ModelStageConfig):
    """How often experts are asked, and what is kept of their answers."""

    problems: int = Field(
        600, gt=0, description="Problems asked of each expert, spread evenly over its families"
    )
    samples: int = Field(4, gt=0, description="Samples a problem and form")
    keep: int = Field(1, gt=0, description="Most samples kept a problem and form, the shortest first")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature")
    max_tokens: int = Field(128, gt=0, description="Longest response in tokens")


def run(config: DistillConfig, context: StageContext) -> None:
    import random
    from collections import Counter

    from data.chat import EOS, ChatTokenizer
    from infra.errors import HeadwaterError
    from model.checkpoint import load_model
    from model.device import pick_device
    from model.engine.engine import Engine
    from model.engine.sampling import Sampling
    from post_training import problem_sets
    from post_training.rejection import Form, keep
    from post_training.rollout import sample
    from post_training.samples import reverify, sample_row, write_samples
    from post_training.tasks.problem import SYSTEM

    device = pick_device(config.device)
    forms = (Form("concise", "", reasons=False), Form("reasoned", SYSTEM, reasons=True))
    rows: list[dict[str, str]] = []
    # By family and form: problems asked, and those with a sample that was kept.
    asked: Counter[str] = Counter()
    served: Counter[str] = Counter()
    for expert in context.inputs_of("experts"):
        families = expert.json("expert.json")["families"]
        tokenizer = ChatTokenizer(expert.file("tokenizer.json"))
        engine = Engine(load_model(expert.path, device=device), [EOS])
        problems = problem_sets.read(context.input("problems").file("train.parquet"), families)
        random.Random(f"{config.seed}/distill").shuffle(problems)
        for family, mine in problem_sets.spread(problems, families, config.problems).items():
            for form in forms:
                sampling = Sampling(config.max_tokens, config.temperature, seed=config.seed)
                rollouts = sample(
                    engine, tokenizer, mine, [form.system] * len(mine), sampling, config.samples
                )
                kept = keep(rollouts, form, config.samples, config.keep)
                rows += [sample_row(tokenizer, rollout, form.name, expert.digest[:12]) for rollout in kept]
                name = f"{family}_{form.name}"
                asked[name] += len(mine)
                served[name] += len({rollout.problem.id for rollout in kept})
                context.log(f"{family}, {form.name}: {len(kept)} samples kept for {len(mine)} problems")
    if not rows:
        raise HeadwaterError(
            "distill: no expert answered any problem correctly; train the experts longer, "
            "or ask easier problems"
        )
    rows.sort(key=lambda row: (row["family"], row["form"], row["problem"], row["thought"], row["answer"]))
    path = context.out / "samples.parquet"
    write_samples(path, rows)
    total, passed = reverify(path, tokenizer)
    if passed != total:
        raise HeadwaterError(
            f"distill: {total - passed} of {total} kept samples fail when read back and verified"
        )
    context.write_json("stats.json", {"samples": total, "asked": asked.total(), "reverified": passed})
    context.metric("samples", total)
    context.metric("kept", served.total() / asked.total())
    for name, count in asked.items():
        context.metric(f"kept_{name}", served[name] / count)
    context.metric("reverified", passed / total)


STAGE = Stage(
    name="distill",
    version=1,
    config=DistillConfig,
    run=run,
    figures=("samples", "kept", "reverified"),
    inputs={
        "experts": InputSpec(("expert",), many=True, description="Experts, one a domain"),
        "problems": InputSpec(("tasks",), description="Problems to ask"),
    },
)
