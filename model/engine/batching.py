"""Putting the new tokens of several rows into one flat batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.engine.forward import Batch, Stretch
from model.engine.pages import PAGE, SCRATCH
from model.engine.rows import Row


def assemble(
    spans: Sequence[tuple[Row, int, list[int]]], table: np.ndarray, first: int = 0, width: int = 1
) -> tuple[Batch, list[int]]:
    """The batch of (row, position of its first new token, new tokens), and where each row's tokens begin.

    Spans of at most `width` tokens are decoding rows, padded to equal width; longer ones are stretches of
    prompt.
    """
    few = [i for i, (_, _, tokens) in enumerate(spans) if len(tokens) <= width]
    many = [i for i, (_, _, tokens) in enumerate(spans) if len(tokens) > width]
    width = max((len(spans[i][2]) for i in few), default=1)
    places = [0] * len(spans)
    tokens: list[int] = []
    lines = [spans[i][0].line for i in few]
    starts = np.array([spans[i][1] for i in few], dtype=np.int64)
    positions = [(starts[:, None] + np.arange(width)).reshape(-1)]
    for i in few:
        places[i] = len(tokens)
        tokens += spans[i][2]
        tokens += [0] * (width - len(spans[i][2]))
    line_of = [np.repeat(np.array(lines, dtype=np.int64), width)]
    stretches = []
    for i in many:
        row, start, new = spans[i]
        places[i] = len(tokens)
        stretches.append(Stretch(table[row.line], len(tokens), start, len(new)))
        positions.append(np.arange(start, start + len(new)))
        line_of.append(np.full(len(new), row.line))
        tokens += new
    position_S = np.concatenate(positions)
    slots = table[np.concatenate(line_of), position_S // PAGE] * PAGE + position_S % PAGE
    kept = np.ones(len(tokens), dtype=bool)
    for place, (row, start, new) in zip(places, spans, strict=True):
        if len(new) < width:
            kept[place + len(new) : place + width] = False
        if row.shared > start:
            kept[place : place + min(len(new), row.shared - start)] = False
    slots = np.where(kept, slots, SCRATCH * PAGE + position_S % PAGE)
    deepest = int(position_S.max()) // PAGE + 1
    return Batch(tokens, position_S, slots, table[lines, :deepest], width, stretches, first), places
