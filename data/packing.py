"""Best-fit packing: put whole pieces into rows of equal length and cut none that fits.

Concatenating everything and cutting every T tokens cuts a quarter of the documents at T = 4096, most of them
needlessly. Best-fit-decreasing takes the pieces from the longest to the shortest and puts each into the
fullest row that still has room, or into a new one; it needs hardly more rows and cuts nothing.
Pretraining and SFT use the same rows: pretraining attends over the whole row (the report, section 4.1,
uses no mask between samples), SFT masks by `segments`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.chat import PAD
from infra.errors import HeadwaterError


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens that stay together in one row."""

    ids: np.ndarray  # [length] int32
    loss: np.ndarray  # [length] uint8, 1 = this token counts as a target when it is predicted


@dataclass(frozen=True, eq=False)
class Rows:
    """N packed rows of T tokens."""

    tokens: np.ndarray  # [N, T] int32, PAD where empty
    segments: np.ndarray  # [N, T] int32, which piece of the row from 0, -1 where empty
    loss: np.ndarray  # [N, T] uint8, 0 where empty

    @property
    def fill(self) -> float:
        """Share of the places that hold a token."""
        return float((self.segments >= 0).mean()) if self.segments.size else 0.0


def pack(lengths: Sequence[int], capacity: int, ordered_below: int = 0) -> list[list[int]]:
    """Assign pieces to rows: the result lists, for each row, the indices of its pieces in their order.

    Every piece lands in exactly one row and no row holds more than `capacity` tokens. Sorting costs O(n
    log n) and each placement a look-up by free space in a two-level bitmap. Ties go to the lower index,
    so the result is a function of the lengths alone.

    Pieces shorter than `ordered_below` are placed last and in the order given instead of by length. Sorted by
    length, a row of short pieces holds pieces of equal length, which are then often of one kind; in a
    shuffled order a row holds a mixture, for a slightly lower fill.

    Raises HeadwaterError if a length is not between 1 and `capacity`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > capacity):
        wrong = int(np.flatnonzero((sizes < 1) | (sizes > capacity))[0])
        raise HeadwaterError(
            f"piece {wrong} has {sizes[wrong]} tokens; rows take 1 to {capacity}: cut it first"
        )
    rank = np.where(sizes < ordered_below, 0, sizes)
    rows: list[list[int]] = []
    space = _SpaceIndex(capacity)
    for index in np.argsort(-rank, kind="stable").tolist():
        size = int(sizes[index])
        free = space.smallest_at_least(size)
        if free < 0:
            row, free = len(rows), capacity
            rows.append([])
        else:
            row = space.take(free)
        rows[row].append(index)
        space.put(free - size, row)
    return rows


class _SpaceIndex:
    """Rows by free space, and the smallest free space that is large enough, found by two bit scans."""

    def __init__(self, capacity: int) -> None:
        self._rows: dict[int, list[int]] = {}
        self._words = [0] * (capacity // 64 + 1)  # bit b of word w: some row has 64 w + b free tokens
        self._filled = 0  # bit w: word w is not 0

    def put(self, free: int, row: int) -> None:
        if free == 0:
            return
        self._rows.setdefault(free, []).append(row)
        self._words[free >> 6] |= 1 << (free & 63)
        self._filled |= 1 << (free >> 6)

    def take(self, free: int) -> int:
        rows = self._rows[free]
        row = rows.pop()
        if not rows:
            self._words[free >> 6] &= ~(1 << (free & 63))
            if not self._words[free >> 6]:
                self._filled &= ~(1 << (free >> 6))
        return row

    def smallest_at_least(self, size: int) -> int:
        """Least free space >= size of any row, -1 if there is none."""
        word = size >> 6
        here = self._words[word] >> (size & 63)
        if here:
            return size + _lowest_bit(here)
        above = self._filled >> (word + 1)
        if not above:
            return -1
        word += 1 + _lowest_bit(above)
        return 64 * word + _lowest_bit(self._words[word])


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def fill_rows(plan: Sequence[Sequence[int]], piece: Callable[[int], Piece], capacity: int) -> Rows:
    """Lay out the rows of a plan from `pack`; `piece(index)` gives each piece when its row is written."""
    shape = (len(plan), capacity)
    tokens = np.full(shape, PAD, dtype=np.int32)
    segments = np.full(shape, -1, dtype=np.int32)
    loss = np.zeros(shape, dtype=np.uint8)
    for row, indices in enumerate(plan):
        at = 0
        for segment, index in enumerate(indices):
            part = piece(index)
            end = at + len(part.ids)
            tokens[row, at:end] = part.ids
            segments[row, at:end] = segment
            loss[row, at:end] = part.loss
            at = end
    return Rows(tokens=tokens, segments=segments, loss=loss)


def rows_from(pieces: Sequence[Piece], capacity: int) -> Rows:
    """Pack pieces that are all in memory (the SFT set) into rows of `capacity` tokens."""
    return fill_rows(pack([len(p.ids) for p in pieces], capacity), pieces.__getitem__, capacity)
