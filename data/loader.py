"""Batches for training: a pure function of the step.

The rows of every epoch are permuted by (seed, epoch) and the epochs follow one another in one endless
stream. Step s takes rows s*B to (s+1)*B of it. Nothing is remembered between steps: to resume, ask for
the next step. With several ranks each takes its share of the same B rows, so the order of the data does
not depend on the layout.
"""

from pathlib import Path

import numpy as np
import torch

from data.hashing import generator
from data.packing import Rows
from data.shards import ShardReader
from infra.errors import HeadwaterError


class ShardLoader:
    """Batches of `batch_rows` rows (over all ranks together) from a folder of token shards.

    Holds one permutation of the rows in memory (8 bytes a row); rows are read from the files when asked for.
    """

    def __init__(
        self, folder: str | Path, batch_rows: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_rows < 1 or batch_rows % world:
            raise HeadwaterError(f"batch_rows {batch_rows} must be a positive multiple of the {world} ranks")
        if not 0 <= rank < world:
            raise HeadwaterError(f"rank {rank} is not one of {world} ranks")
        self.reader = ShardReader(folder)
        self.batch_rows = batch_rows
        self.seed = seed
        self.rank = rank
        self.world = world
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def rows(self) -> int:
        """Rows in one epoch."""
        return self.reader.rows

    @property
    def sequence_length(self) -> int:
        return self.reader.sequence_length

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """This rank's part of step `step` (from 0): see `stream`."""
        return self.stream(step * self.batch_rows, self.batch_rows)

    def stream(self, start: int, count: int) -> dict[str, torch.Tensor]:
        """This rank's part of `count` rows from place `start` of the endless stream.

        For schedules that change the batch size: keep the number of rows seen and ask for the next ones.
        Gives tokens [count/world, T] int64, segments [count/world, T] int32, loss [count/world, T] uint8.
        """
        if start < 0 or count < 1 or count % self.world:
            raise HeadwaterError(
                f"rows {start}+{count}: need a start >= 0 and a multiple of {self.world} rows"
            )
        places = np.arange(start + self.rank, start + count, self.world)
        rows = self.reader.read([self._row(int(place)) for place in places])
        return as_tensors(rows)

    def _row(self, place: int) -> int:
        epoch, at = divmod(place, self.reader.rows)
        if epoch != self._epoch:
            self._order = generator("loader", self.seed, epoch).permutation(self.reader.rows)
            self._epoch = epoch
        return int(self._order[at])


def as_tensors(rows: Rows) -> dict[str, torch.Tensor]:
    """Rows as torch tensors: tokens int64 (as the loss wants them), segments int32, loss uint8."""
    return {
        "tokens": torch.from_numpy(rows.tokens).to(torch.int64),
        "segments": torch.from_numpy(rows.segments),
        "loss": torch.from_numpy(rows.loss),
    }
