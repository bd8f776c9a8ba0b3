"""Add step by step, with a checkpoint after each step: the toy pipeline's training."""

from __future__ import annotations

from pydantic import Field

from infra.config import StageConfig, placement
from infra.stage import InputSpec, Stage, StageContext


class SlowConfig(StageConfig):
    """How many steps, and how long each takes."""

    steps: int = Field(4, ge=1, description="Steps")
    pause: float = placement(0.0, ge=0, description="Seconds a step")


def run(config: SlowConfig, context: StageContext) -> None:
    import json
    import time

    from infra.files import atomic_write_json

    numbers = [sum(one.json("numbers.json")) for one in context.inputs_of("numbers")]
    state = context.scratch / "state.json"
    step, total = json.loads(state.read_text()) if state.exists() else (0, 0)
    (context.out / "logs").mkdir(parents=True)
    with (context.scratch / "metrics.jsonl").open("a") as lines:
        while step < config.steps:
            time.sleep(config.pause)
            step, total = step + 1, total + sum(numbers) + config.seed
            lines.write(json.dumps({"step": step, "tokens": step * 10, "loss": 1.0 / step}) + "\n")
            lines.flush()
            context.fault("checkpoint.before")
            atomic_write_json(state, [step, total], points=None)
            context.fault("checkpoint.after")
            context.progress(step, config.steps, loss=1.0 / step)
    (context.out / "logs" / "metrics.jsonl").write_bytes((context.scratch / "metrics.jsonl").read_bytes())
    context.write_json("numbers.json", [total])
    context.metric("total", total)
    context.metric("score", 0.25 + 0.5 * (config.steps > 3))


STAGE = Stage(
    name="slow",
    version=1,
    config=SlowConfig,
    run=run,
    figures=("total",),
    inputs={
        "numbers": InputSpec(("source", "slow"), many=True, description="What to add"),
        "earlier": InputSpec(("slow",), optional=True, description="What to go on from"),
    },
)
