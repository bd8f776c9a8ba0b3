"""Packing weighted items into bins of equal room so that the fullest bin is as light as can be.

Many packings at once: every array has a leading row axis N, and one numpy call serves all rows. Items that
share a label (copies of one expert) go to different bins where there is room.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.intp]
Floats = NDArray[np.float64]

CLOSE = 1e-12
"""A swap must gain more than this share of the fullest bin: less is rounding."""


def pack(weights: Floats, labels: Ints, bins: int, target: Floats | None = None) -> Ints:
    """Put items into bins: heaviest first into the lightest bin with room, then pairwise swaps.

    Args:
        weights: [N, items], not negative.
        labels: [N, items], 0 or more; `items` is a multiple of `bins`.
        bins: How many, each with room for items / bins.
        target: [N], swaps end once no bin is heavier. By default the mean bin, which cannot be beaten.

    Returns:
        The bin of each item [N, items]; each bin is named exactly items / bins times.
    """
    rows, items = weights.shape
    if items == bins:
        return np.tile(np.arange(items), (rows, 1))
    if target is None:
        target = weights.sum(1) / bins
    placed = heaviest_first(weights, labels, bins)
    swap(weights, labels, placed, bins, target)
    return placed


def heaviest_first(weights: Floats, labels: Ints, bins: int) -> Ints:
    """Longest processing time with room: the bin of each item [N, items]."""
    rows, items = weights.shape
    row = np.arange(rows)
    order = np.lexsort((labels, -weights))
    placed = np.empty((rows, items), dtype=np.intp)
    load, room = np.zeros((rows, bins)), np.full((rows, bins), items // bins)
    # Copies of a label weigh the same, so they follow one another: only the last label's bins need memory.
    holds, last = np.zeros((rows, bins), dtype=bool), np.full(rows, -1)
    beyond = weights.sum(1, keepdims=True) + 1.0
    for item in order.T:
        label = labels[row, item]
        holds[label != last] = False
        last = label
        cost = load + beyond * holds
        cost[room == 0] = np.inf
        chosen = cost.argmin(1)
        placed[row, item] = chosen
        load[row, chosen] += weights[row, item]
        room[row, chosen] -= 1
        holds[row, chosen] = True
    return placed


def swap(weights: Floats, labels: Ints, placed: Ints, bins: int, target: Floats) -> None:
    """Improve `placed` [N, items] in place: trade an item of the fullest bin for one of another bin, the
    best trade of all, until the fullest bin is at `target` [N] or no trade makes it lighter.

    A trade never puts two items of one label into a bin.
    """
    rows, items = weights.shape
    room = items // bins
    row = np.arange(rows)
    contents = np.argsort(placed, axis=1, kind="stable").reshape(rows, bins, room)
    load = np.take_along_axis(weights[:, None], contents, 2).sum(2)
    held = np.zeros((rows, bins, int(labels.max()) + 1), dtype=np.int16)
    np.add.at(held, (row[:, None], placed, labels), 1)
    active = row[load.max(1) > target * (1 + CLOSE)]
    while len(active):
        full = load[active].argmax(1)
        most = load[active, full]
        mine = contents[active, full]
        moved = np.take_along_axis(weights[active], mine, 1)[:, :, None] - weights[active][:, None]
        bin_of = placed[active]
        after = np.maximum(
            most[:, None, None] - moved, np.take_along_axis(load[active], bin_of, 1)[:, None] + moved
        )
        mine_label = np.take_along_axis(labels[active], mine, 1)
        twice = held[active[:, None, None], bin_of[:, None], mine_label[:, :, None]] > 0
        twice |= (held[active[:, None], full[:, None], labels[active]] > 0)[:, None]
        after[twice | (bin_of == full[:, None])[:, None]] = np.inf
        best = after.reshape(len(active), -1).argmin(1)
        gained = after.reshape(len(active), -1)[np.arange(len(active)), best] < most * (1 - CLOSE)
        active, best, full, mine = active[gained], best[gained], full[gained], mine[gained]
        one, other = mine[np.arange(len(active)), best // items], best % items
        theirs = placed[active, other]
        for item, source, sink in ((one, full, theirs), (other, theirs, full)):
            held[active, source, labels[active, item]] -= 1
            held[active, sink, labels[active, item]] += 1
            placed[active, item] = sink
            load[active, source] -= weights[active, item]
            load[active, sink] += weights[active, item]
        spot = np.argmax(contents[active, full] == one[:, None], axis=1)
        contents[active, full, spot] = other
        spot = np.argmax(contents[active, theirs] == other[:, None], axis=1)
        contents[active, theirs, spot] = one
        active = active[load[active].max(1) > target[active] * (1 + CLOSE)]
