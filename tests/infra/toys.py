"""Toy stages for the tests of the store: small, deterministic, resumable."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from infra.config import Section, StageConfig, placement
from infra.files import atomic_write_bytes, atomic_write_text, sha256_file
from infra.stage import InputSpec, SourceFile, Stage, StageContext


class Shape(Section):
    """Shape of the toy."""

    width: int = Field(4, ge=1)
    workers: int = placement(1)


class WordsConfig(StageConfig):
    """A source of words."""

    folder: str = ""
    words: tuple[str, ...] = ("one", "two", "three")
    shape: Shape = Shape()


def scan(config: WordsConfig) -> list[SourceFile]:
    """Hash the files of the folder, if one is given."""
    if not config.folder:
        return []
    paths = sorted(path for path in Path(config.folder).iterdir() if path.is_file())
    return [SourceFile(path.name, path.stat().st_size, sha256_file(path)) for path in paths]


def make_words(config: WordsConfig, context: StageContext) -> None:
    """Write each word, then their count, and a log that differs from run to run."""
    for i, word in enumerate(config.words):
        atomic_write_text(context.out / "words" / f"{i:03d}.txt", word * config.shape.width)
        context.progress(i + 1, len(config.words))
    context.write_json("stats.json", {"words": len(config.words), "seed": context.seed})
    atomic_write_text(context.out / "logs" / "clock.txt", str(time.time_ns()))
    context.metric("words", len(config.words))
    context.timing("rate", 1.5)


class TrainConfig(StageConfig):
    """A toy training run."""

    steps: int = Field(6, ge=1)
    every: int = Field(2, ge=1)
    rate: float = 0.5
    pause: float = placement(0.0)


def train(config: TrainConfig, context: StageContext) -> None:
    """Fold random numbers into a state, step by step, with a checkpoint every few steps."""
    import torch

    from infra.checkpoint import Checkpoints
    from infra.files import write_tensors

    generator = torch.Generator().manual_seed(config.seed)
    weights, start = torch.zeros(8), 0
    checkpoints = Checkpoints(context.scratch / "checkpoints", log=context.log)
    saved = checkpoints.latest()
    if saved is not None:
        weights, start = saved.tensors["weights"], saved.step
        generator.set_state(saved.tensors["generator"])
        context.log(f"resumed at step {start}")
    for step in range(start, config.steps):
        weights = weights * config.rate + torch.randn(8, generator=generator)
        time.sleep(config.pause)
        if (step + 1) % config.every == 0:
            state = {"weights": weights, "generator": generator.get_state()}
            checkpoints.save(step + 1, state, {"step": step + 1})
            context.progress(step + 1, config.steps, norm=float(weights.norm()))
    text = "".join(
        path.read_text() for one in context.inputs_of("words") for path in one.files("words/*.txt")
    )
    write_tensors(
        context.out / "model.safetensors", {"weights": weights + len(text)}, {"steps": config.steps}
    )
    context.write_json("config.json", {"steps": config.steps})
    context.metric("norm", weights.norm())


class FillConfig(StageConfig):
    """How to meet a full disk."""

    how: str = "write"
    mebibytes: int = 1


def fill(config: FillConfig, context: StageContext) -> None:
    """Write real bytes to a disk that may be too small."""
    (context.scratch / "progress").write_text("kept")
    if config.how == "device":
        # The kernel's own full disk, which needs no rights to set up.
        with open("/dev/full", "wb", buffering=0) as handle:
            handle.write(b"x")
    for i in range(config.mebibytes):
        atomic_write_bytes(context.out / f"{i:03d}.bin", bytes(1 << 20))
    if config.how == "leave-nothing":
        # Take what is left, so that the stage succeeds and publishing is what fails.
        with (context.scratch / "rest").open("wb", buffering=0) as handle:
            try:
                while handle.write(bytes(1 << 12)):
                    pass
            except OSError:
                return


WORDS = Stage("words", 1, WordsConfig, make_words, scan=scan)
TRAIN = Stage(
    "train",
    1,
    TrainConfig,
    train,
    inputs={"words": InputSpec(("words",), many=True), "base": InputSpec(("train",), optional=True)},
)
FILL = Stage("fill", 1, FillConfig, fill)
STAGES = {stage.name: stage for stage in (WORDS, TRAIN, FILL)}
