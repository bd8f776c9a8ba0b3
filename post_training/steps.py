"""The end of a step in the loops of this folder: check, log, checkpoint, report, in that order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TextIO

from torch import nn

from model.optim.build import Optimizer
from model.train import CheckpointStore, Position, TrainingDiverged, run_tensors

Progress = Callable[[Position, dict[str, float]], None]


def finish_step(
    position: Position,
    figures: dict[str, float],
    finite: Mapping[str, float],
    model: nn.Module,
    optimizer: Optimizer,
    checkpoints: CheckpointStore,
    keep: bool,
    log: TextIO,
    progress: Progress,
) -> None:
    """Write the step's line to the log, save a checkpoint if `keep`, then tell `progress`.

    The line goes first: a process killed between the two writes it again when it resumes, where a line that
    came after its checkpoint would be lost. Raises TrainingDiverged, before anything is written, when one of
    the `finite` figures is not a finite number.
    """
    wrong = [f"{name} is {value}" for name, value in finite.items() if not math.isfinite(value)]
    if wrong:
        raise TrainingDiverged(
            f"step {position.step}: {', '.join(wrong)}. Lower the learning rate; the last checkpoint is from "
            "before this step"
        )
    log.write(json.dumps({"step": position.step, "tokens": position.tokens, **figures}) + "\n")
    log.flush()
    if keep:
        checkpoints.save(position.step, run_tensors(model, optimizer), asdict(position))
    progress(position, figures)
