"""An interpolated bigram model over token ids: the bar that a trained network has to clear.

    p(t | s) = w_k c(s, t) / c(s) + (1 - w_k) ((1 - u) c(t) / N + u / V)

Jelinek-Mercer smoothing in buckets: the weight w_k of the bigram depends on how often the context s was
seen, and so does not trust a context seen once. The weights are fitted by expectation maximisation on a
slice of the training rows that the counts did not see; then the counts are taken again over all training
rows.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data.packing import Rows

_ROUNDS = 50


@dataclass(frozen=True)
class Score:
    """How well a model predicts the targets (loss = 1) of some rows."""

    targets: int
    nats: float  # summed over the targets

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.targets)

    def bits_per_byte(self, size: int) -> float:
        """`size` is the bytes of text that the targets spell."""
        return self.nats / math.log(2.0) / max(1, size)


class BigramModel:
    """Counts of a training set and interpolation weights. While it is made, 16 bytes a training token."""

    def __init__(self, train: Iterable[Rows], vocab_size: int, tune_share: float = 0.1) -> None:
        self.vocab_size = vocab_size
        every = max(2, round(1 / tune_share))
        chunks = [_pairs(rows) for rows in train]
        contexts = np.concatenate([c for c, _ in chunks]) if chunks else np.empty(0, np.int64)
        targets = np.concatenate([t for _, t in chunks]) if chunks else np.empty(0, np.int64)
        # Blocks of 64 pairs, so that the slice is spread over all rows and yet mostly running text.
        tune = (np.arange(len(targets)) // 64) % every == 0
        self._count(contexts[~tune], targets[~tune])
        self.bigram_weights = np.full(_BUCKETS, 0.5)
        self.uniform_weight = 0.01 if len(targets) else 1.0
        self._fit(contexts[tune], targets[tune])
        self._count(contexts, targets)

    def _count(self, contexts: np.ndarray, targets: np.ndarray) -> None:
        self._keys, self._pair_counts = np.unique(contexts * self.vocab_size + targets, return_counts=True)
        self._context_counts = np.bincount(contexts, minlength=self.vocab_size)
        self._unigram_counts = np.bincount(targets, minlength=self.vocab_size)
        self._total = max(1, len(targets))

    def _parts(self, contexts: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bigram and unigram relative frequencies of each target, and the bucket of its context."""
        seen = self._context_counts[contexts]
        pairs = np.zeros(len(targets))
        if len(self._keys):
            wanted = contexts * self.vocab_size + targets
            at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            pairs = np.where(self._keys[at] == wanted, self._pair_counts[at], 0)
        return pairs / np.maximum(seen, 1), self._unigram_counts[targets] / self._total, _bucket(seen)

    def _fit(self, contexts: np.ndarray, targets: np.ndarray) -> None:
        """Expectation maximisation of the weights; contexts never seen get no bigram weight."""
        bigram, unigram, bucket = self._parts(contexts, targets)
        for _ in range(_ROUNDS if len(targets) else 0):
            weight = self.bigram_weights[bucket]
            lower = (1 - self.uniform_weight) * unigram + self.uniform_weight / self.vocab_size
            whole = weight * bigram + (1 - weight) * lower
            from_bigram = weight * bigram / whole
            size = np.bincount(bucket, minlength=_BUCKETS)
            fitted = np.bincount(bucket, from_bigram, minlength=_BUCKETS) / np.maximum(size, 1)
            self.bigram_weights = np.where(size > 0, fitted, self.bigram_weights)
            uniform = (1 - weight) * self.uniform_weight / self.vocab_size / whole
            self.uniform_weight = float(uniform.sum() / max((1 - from_bigram).sum(), 1e-12))
        for place in range(1, _BUCKETS):  # a bucket that the slice never met does as the one below
            if len(targets) and not (bucket == place).any():
                self.bigram_weights[place] = self.bigram_weights[place - 1]
        self.uniform_weight = min(max(self.uniform_weight, 1e-4), 1.0)  # no target is impossible
        self.bigram_weights = np.clip(self.bigram_weights, 0.0, 1.0 - 1e-4)
        self.bigram_weights[0] = 0.0

    def probabilities(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """[n] float64: p(target | context) of each pair of ids."""
        bigram, unigram, bucket = self._parts(contexts.astype(np.int64), targets.astype(np.int64))
        weight = self.bigram_weights[bucket]
        lower = (1 - self.uniform_weight) * unigram + self.uniform_weight / self.vocab_size
        return weight * bigram + (1 - weight) * lower

    def score(self, rows: Iterable[Rows]) -> Score:
        """Loss over all targets that have a token before them in their row."""
        targets, nats = 0, 0.0
        for part in rows:
            contexts, wanted = _pairs(part)
            targets += len(wanted)
            nats -= float(np.log(self.probabilities(contexts, wanted)).sum())
        return Score(targets, nats)


_BUCKETS = 16


def _bucket(seen: np.ndarray) -> np.ndarray:
    """0 for a context never seen, else 1 + the logarithm of how often."""
    return np.minimum(np.ceil(np.log2(np.maximum(seen, 0) + 1)).astype(np.int64), _BUCKETS - 1)


def _pairs(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(token before, token) of every place with loss 1 that is not the first of its row."""
    wanted = (rows.loss[:, 1:] == 1) & (rows.segments[:, 1:] >= 0)
    return rows.tokens[:, :-1][wanted].astype(np.int64), rows.tokens[:, 1:][wanted].astype(np.int64)
