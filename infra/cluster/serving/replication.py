"""How many copies each expert gets: `replicate`, and for two slots a GPU `recount_pairs`, which is better.

Copies of an expert share its load equally. Many layers at once: arrays have a leading row axis N.
"""

from __future__ import annotations

import numpy as np

from infra.cluster.serving.packing import CLOSE, Floats, Ints


def replicate(load: Floats, replicas: int, gpus: int) -> Ints:
    """Copies of each expert [N, experts], `replicas` a row, each at least one.

    Each further copy goes where a copy carries most, but not to an expert that already has one for each of
    the `gpus`, as long as there are others: two copies on one GPU take no load off it. No other counts
    within that limit have a lighter heaviest copy.
    """
    rows, experts = load.shape
    row = np.arange(rows)
    counts = np.ones((rows, experts), dtype=np.intp)
    beyond = load.max(1) + 1.0
    each = load - (beyond[:, None] if gpus == 1 else 0.0)
    for _ in range(replicas - experts):
        heaviest = each.argmax(1)
        counts[row, heaviest] += 1
        count = counts[row, heaviest]
        each[row, heaviest] = load[row, heaviest] / count - beyond * (count >= gpus)
    return counts


def recount_pairs(load: Floats, counts: Ints, gpus: int, target: Floats) -> Ints:
    """Better counts [N, experts] where each of the `gpus` has two slots.

    Pairing the heaviest copy with the lightest, the second heaviest with the second lightest and so on is
    then optimal, so counts can be judged by one sort. The lightest heaviest copy does not make the lightest
    heaviest pair: a copy moves to one of the two experts of the heaviest pair, from whichever expert makes
    that pair lightest, until no such move helps or the pair is at `target` [N].
    """
    counts = counts.copy()
    heaviest, pair = _heaviest_pair(load, counts)
    active = np.flatnonzero(heaviest > target * (1 + CLOSE))
    while len(active):
        # Every expert with copies to spare (row, giver) x both experts of that row's heaviest pair.
        row, giver = np.nonzero(counts[active] > 1)
        row, giver = np.repeat(row, 2), np.repeat(giver, 2)
        taker = pair[active][row, np.arange(len(row)) % 2]
        allowed = (giver != taker) & (counts[active[row], taker] < gpus)
        row, giver, taker = row[allowed], giver[allowed], taker[allowed]
        if not len(row):
            break
        tried = counts[active[row]]
        move = np.arange(len(row))
        tried[move, giver] -= 1
        tried[move, taker] += 1
        found, pairs = _heaviest_pair(load[active[row]], tried)
        # The first of each row in the order (row, result).
        order = np.lexsort((found, row))
        first = order[np.unique(row[order], return_index=True)[1]]
        first = first[found[first] < heaviest[active[row[first]]] * (1 - CLOSE)]
        active = active[row[first]]
        counts[active], heaviest[active], pair[active] = tried[first], found[first], pairs[first]
        active = active[heaviest[active] > target[active] * (1 + CLOSE)]
    return counts


def copies(counts: Ints) -> Ints:
    """The expert of each copy [N, replicas], in the order of the experts."""
    rows, experts = counts.shape
    every = np.broadcast_to(np.arange(experts), counts.shape)
    return np.repeat(every.ravel(), counts.ravel()).reshape(rows, -1)


def _heaviest_pair(load: Floats, counts: Ints) -> tuple[Floats, Ints]:
    """Load of the heaviest pair [N] under the best pairing, and its two experts [N, 2].

    Copies of one expert may meet here: the packing that follows keeps them apart, and is judged by itself.
    """
    labels = copies(counts)
    each = np.take_along_axis(load / counts, labels, 1)
    order = each.argsort(1)
    each = np.take_along_axis(each, order, 1)
    half = each.shape[1] // 2
    both = each[:, :half] + each[:, ::-1][:, :half]
    at, row = both.argmax(1), np.arange(len(load))
    ends = np.stack([order[row, at], order[row, -1 - at]], 1)
    return both[row, at], np.take_along_axis(labels, ends, 1)
