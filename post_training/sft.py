"""Supervised fine-tuning: conversations packed into rows whose samples cannot see each other (report §5.1).

Only responses count as targets. Packing is masked, the opposite of pretraining's.
Legend: N rows, T positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.chat import ChatTokenizer
from data.loader import as_tensors
from data.packing import Piece, rows_from
from infra.errors import HeadwaterError
from model.optim.build import Optimizer
from model.schedule import cosine
from model.train import CheckpointStore, LoopConfig, Position, Step, train
from model.transformer import Transformer


@dataclass(frozen=True)
class Conversation:
    """One sample in text form; `thought` is "" for a direct answer, `answer` is what follows it."""

    prompt: str
    thought: str
    answer: str
    system: str = ""


def drop_prompts(samples: Sequence[Conversation], share: float, seed: int) -> list[Conversation]:
    """The samples, `share` of the reasoned ones without their system prompt; a function of sample and seed.

    What a policy never samples is never reinforced: without these, reasoning unasked can be too rare for
    reinforcement learning to find.
    """

    def dropped(sample: Conversation) -> bool:
        rng = random.Random(f"{seed}/prompt/{sample.prompt}/{sample.thought}")
        return bool(sample.system and sample.thought) and rng.random() < share

    return [replace(sample, system="") if dropped(sample) else sample for sample in samples]


@dataclass(frozen=True)
class SFTConfig:
    epochs: float = 2.0
    """Passes over the samples."""
    batch_rows: int = 16
    """Packed rows a step."""
    micro_rows: int = 8
    """Rows of a micro-batch."""
    warmup: int = 10
    """Steps of linear warmup."""
    floor: float = 0.2
    """Last learning rate over the peak; 1e-6 / 5e-6 in the report."""

    def steps(self, rows: int) -> int:
        """Optimizer steps on `rows` packed rows, at least one."""
        return max(1, round(self.epochs * rows / self.batch_rows))


class PackedSamples:
    """Packed conversations as a batch source; each epoch has its own order, a function of the seed.

    `count` rows; `left_out` samples were longer than a row. Raises
    HeadwaterError when no sample fits.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, samples: Sequence[Conversation], length: int, seed: int
    ) -> None:
        pieces = [self._piece(tokenizer, sample) for sample in samples]
        fitting = [piece for piece in pieces if len(piece.ids) <= length]
        if not fitting:
            raise HeadwaterError(
                f"none of the {len(samples)} fine-tuning samples fits a row of {length} tokens: "
                "raise sequence_length or give shorter samples"
            )
        self.left_out = len(pieces) - len(fitting)
        self._tensors = as_tensors(rows_from(fitting, length))
        self.count = self._tensors["tokens"].shape[0]
        self.seed = seed

    @staticmethod
    def _piece(tokenizer: ChatTokenizer, sample: Conversation) -> Piece:
        prompt = tokenizer.prompt_ids(sample.prompt, sample.system)
        response = tokenizer.response_ids(sample.thought, sample.answer)
        loss = np.zeros(len(prompt) + len(response), dtype=np.uint8)
        loss[len(prompt) :] = 1
        return Piece(np.asarray([*prompt, *response], dtype=np.int32), loss)

    def stream(self, start: int, count: int) -> dict[str, Tensor]:
        """`count` rows from place `start` of all epochs one after another; see model.train.BatchSource."""
        places = np.arange(start, start + count)
        picked = np.empty(count, dtype=np.int64)
        for epoch in np.unique(places // self.count):
            order = np.random.default_rng((self.seed, int(epoch))).permutation(self.count)
            inside = places // self.count == epoch
            picked[inside] = order[places[inside] % self.count]
        index = torch.from_numpy(picked)
        return {name: tensor[index] for name, tensor in self._tensors.items()}


def fine_tune(
    model: Transformer,
    optimizer: Optimizer,
    samples: PackedSamples,
    config: SFTConfig,
    checkpoints: CheckpointStore,
    log_file: Path,
    progress: Callable[[Position, dict[str, float]], None],
    checkpoint_every: int = 50,
) -> Position:
    """Train on responses for `config.epochs`; resumes from the last checkpoint."""
    steps = config.steps(samples.count)

    def schedule(position: Position) -> Step | None:
        if position.step >= steps:
            return None
        return Step(config.batch_rows, cosine(position.step, steps, config.warmup, config.floor))

    loop = LoopConfig(
        mask_documents=True,
        micro_rows=config.micro_rows,
        lanes=torch.get_num_threads(),
        checkpoint_every=checkpoint_every,
    )
    return train(model, optimizer, samples, schedule, loop, checkpoints, log_file, progress)
