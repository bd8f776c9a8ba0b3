"""A tiny run of the training loop: a synthetic source, checkpoints in memory, and one call to start it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.ema import EMA
from model.optim.build import OptimizerConfig, build_optimizer
from model.train import CheckpointStore, LoopConfig, Position, Step, train
from model.transformer import Transformer
from tests.model.tiny import TINY, tokens


class Rows:
    """Rows of one repeated pattern each, so that there is something to learn; a pure function of position."""

    def __init__(self, rows: int, length: int, counted: float = 1.0, documents: int = 1) -> None:
        self.rows, self.length, self.counted, self.documents = rows, length, counted, documents

    def stream(self, start: int, count: int) -> dict[str, Tensor]:
        rows = [self._row(index % self.rows) for index in range(start, start + count)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, index: int) -> dict[str, Tensor]:
        pattern = tokens(1, 4, seed=index, vocab_size=TINY.vocab_size)[0]
        generator = torch.Generator().manual_seed(index)
        return {
            "tokens": pattern.repeat(self.length // 4 + 1)[: self.length].int(),
            "segments": (torch.arange(self.length) * self.documents // self.length).int(),
            "loss": (torch.rand(self.length, generator=generator) < self.counted).to(torch.uint8),
        }


class Shelf:
    """A checkpoint store in memory that copies what it is given."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Tensor], dict[str, Any]]] = []

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.saved.append((step, {k: v.detach().clone() for k, v in tensors.items()}, dict(state)))

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        return self.saved[-1] if self.saved else None


def run(
    folder: Path,
    model: Transformer,
    source: Rows,
    steps: int,
    *,
    rows: int = 4,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    mtp_weight: float = 0.3,
    bias_speed: float = 0.0,
    store: CheckpointStore | None = None,
    progress: Callable[[Position, dict[str, float]], None] = lambda position, figures: None,
    watch: Callable[[Position], dict[str, float]] | None = None,
    ema: EMA | None = None,
    **loop: Any,
) -> Position:
    """Train `model` for `steps` steps in all, going on from `store`'s last checkpoint; logs to log.jsonl."""

    def schedule(position: Position) -> Step | None:
        if position.step >= steps:
            return None
        return Step(rows, (position.step + 1) / steps, mtp_weight, bias_speed)

    config = OptimizerConfig(name=optimizer, lr=lr, muon_lr=lr)
    store = Shelf() if store is None else store
    return train(
        model,
        build_optimizer(model, config),
        source,
        schedule,
        LoopConfig(**loop),
        store,
        folder / "log.jsonl",
        progress,
        watch,
        ema,
    )
