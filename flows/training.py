"""What the stages that train have in common: optimizer settings, progress, and what they publish beside
weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows import plots
from infra.artifact import Artifact
from infra.errors import HeadwaterError
from infra.stage import StageContext

if TYPE_CHECKING:
    from model.train import Position
    from model.transformer import Transformer

_CURVES = ("loss", "watched_loss", "watched_loss_ema", "mtp_loss")


def progress(
    context: StageContext, done: Callable[[Position], int], total: int, every: int = 10
) -> Callable[[Position, dict[str, float]], None]:
    """A training loop's progress callback: every tenth step reaches whoever watches the stage."""

    def report(position: Position, figures: dict[str, float]) -> None:
        if position.step % every == 0 or done(position) >= total:
            shown = {key: figures[key] for key in ("loss", "tokens_per_second") if key in figures}
            context.progress(done(position), total, **shown)

    return report


def check_shards(shards: Artifact, tokenizers: set[str], vocab_size: int) -> None:
    """Raise HeadwaterError when shards do not belong to a model: their tokenizer is none of `tokenizers`
    (digests of artifacts; nothing is known where either side is empty), or has more ids than `vocab_size`."""
    packed_with = [ref for ref in shards.record.inputs if ref.role == "tokenizer"]
    if tokenizers and any(ref.digest not in tokenizers for ref in packed_with):
        raise HeadwaterError(
            f"{shards.ref} was packed with {packed_with[0].ref}, and the model has another tokenizer: it "
            "would read noise. Give both the same tokenizer artifact"
        )
    vocabulary = shards.json("stats.json")["vocab_size"]
    if vocabulary > vocab_size:
        raise HeadwaterError(
            f"model.vocab_size is {vocab_size}, but {shards.ref} uses {vocabulary} tokens: set it to at "
            "least that when the model is pretrained"
        )


def checkpoint_metrics(context: StageContext, model: Transformer) -> None:
    """Size of the model, in the record."""
    from model.transformer import count_parameters

    context.metric("parameters", count_parameters(model))


def copy_tokenizer(source: Path, context: StageContext) -> None:
    """A checkpoint carries its tokenizer, so that whoever has the one has the other."""
    shutil.copyfile(source, context.out / "tokenizer.json")


def publish_training(
    context: StageContext, log_file: Path, name: str = "metrics", unit: str = "nats per token"
) -> None:
    """Copy a training log into the artifact's logs as `name`.jsonl and draw its curves."""
    lines = _publish_log(context, log_file, name)
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for key in _CURVES:
        points = [(line["tokens"], line[key]) for line in lines if key in line]
        if points and any(value for _, value in points):
            xs, ys = zip(*points, strict=True)
            series[key.replace("_", " ")] = (xs, plots.smooth(ys) if not key.startswith("watched") else ys)
    plots.curves(context.out / "plots" / f"{name}.png", series, "tokens", unit)
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    if speeds:
        context.timing(f"{name}_tokens_per_second", speeds[len(speeds) // 2])


def publish_rl(context: StageContext, log_file: Path, position: Position) -> None:
    """Copy a reinforcement-learning log into the artifact's logs, draw it, and record what it cost."""
    lines = _publish_log(context, log_file, "rl")
    steps = [line["step"] for line in lines]
    series = {
        key.replace("_", " "): (steps, plots.smooth([line[key] for line in lines], 0.8))
        for key in ("reward", "correct", "reasoned", "well_formed")
    }
    plots.curves(context.out / "plots" / "rl.png", series, "steps", "share")
    context.metric("rl_steps", position.step)
    context.metric("sequence_tokens", position.tokens)
    context.timing("rollout_seconds", sum(line["rollout_seconds"] for line in lines))
    context.timing("update_seconds", sum(line["update_seconds"] for line in lines))


def _publish_log(context: StageContext, log_file: Path, name: str) -> list[dict[str, float]]:
    """The lines of a log, after it was copied into the artifact."""
    logs = context.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log_file, logs / f"{name}.jsonl")
    return plots.read_jsonl(log_file)
