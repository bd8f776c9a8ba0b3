"""What the stages that train have in common: optimizer settings, progress, and what they publish beside
weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flows import plots
from infra.stage import StageContext

if TYPE_CHECKING:
    from model.train import Position
    from model.transformer import Transformer

_CURVES = ("loss", "held_out_loss", "mtp_loss")


def progress(
    context: StageContext, done: Callable[[Position], int], total: int, every: int = 10
) -> Callable[[Position, dict[str, float]], None]:
    """A training loop's progress callback: every tenth step reaches whoever watches the stage."""

    def report(position: Position, figures: dict[str, float]) -> None:
        if position.step % every == 0 or done(position) >= total:
            shown = {key: figures[key] for key in ("loss", "tokens_per_second") if key in figures}
            context.progress(done(position), total, **shown)

    return report


def checkpoint_metrics(context: StageContext, model: Transformer) -> None:
    """Size of the model, in the record."""
    from model.transformer import count_parameters

    context.metric("parameters", count_parameters(model))


def copy_tokenizer(source: Path, context: StageContext) -> None:
    """A checkpoint carries its tokenizer, so that whoever has the one has the other."""
    shutil.copyfile(source, context.out / "tokenizer.json")


def publish_training(context: StageContext, log_file: Path, name: str = "metrics") -> None:
    """Move a training log into the artifact's logs and draw its curves."""
    logs = context.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log_file, logs / f"{name}.jsonl")
    lines = plots.read_jsonl(log_file)
    series = {}
    for key in _CURVES:
        points = [(line["tokens"], line[key]) for line in lines if key in line]
        if points and any(value for _, value in points):
            xs, ys = zip(*points, strict=True)
            series[key.replace("_", " ")] = (xs, plots.smooth(ys) if key != "held_out_loss" else ys)
    plots.curves(context.out / "plots" / f"{name}.png", series, "tokens", "nats per token")
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    if speeds:
        context.timing(f"{name}_tokens_per_second", speeds[len(speeds) // 2])


def publish_rl(context: StageContext, log_file: Path) -> None:
    """Move a reinforcement-learning log into the artifact's logs, draw it, and record what it cost."""
    logs = context.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log_file, logs / "rl.jsonl")
    lines = plots.read_jsonl(log_file)
    steps = [line["step"] for line in lines]
    series = {
        key.replace("_", " "): (steps, plots.smooth([line[key] for line in lines], 0.8))
        for key in ("reward", "correct", "reasoned", "well_formed")
    }
    plots.curves(context.out / "plots" / "rl.png", series, "steps", "share")
    context.metric("rl_steps", len(lines))
    context.metric("sequence_tokens", sum(line["sequence_tokens"] for line in lines))
    context.timing("rollout_seconds", sum(line["rollout_seconds"] for line in lines))
    context.timing("update_seconds", sum(line["update_seconds"] for line in lines))
