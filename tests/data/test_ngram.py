import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.ngram import BigramModel
from data.packing import Rows

V = 7


def make_rows(tokens: np.ndarray, loss: np.ndarray | None = None) -> Rows:
    loss = np.ones(tokens.shape, np.uint8) if loss is None else loss
    return Rows(tokens.astype(np.int32), np.zeros(tokens.shape, np.int32), loss)


def chain(rng: np.random.Generator, rows: int, length: int, table: np.ndarray) -> np.ndarray:
    """Samples of a Markov chain."""
    out = np.zeros((rows, length), dtype=np.int64)
    for i in range(rows):
        for j in range(1, length):
            out[i, j] = rng.choice(len(table), p=table[out[i, j - 1]])
    return out


@given(seed=st.integers(0, 50))
def test_probabilities_sum_to_one_and_none_is_zero(seed):
    rng = np.random.default_rng(seed)
    model = BigramModel([make_rows(rng.integers(0, V - 1, (3, 40)))], V)  # the last id never occurs
    for context in range(V):
        p = model.probabilities(np.full(V, context), np.arange(V))
        assert p.sum() == pytest.approx(1.0)
        assert p.min() > 0


def test_equals_a_count_by_hand():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (4, 30))
    loss = rng.integers(0, 2, tokens.shape).astype(np.uint8)
    model = BigramModel([make_rows(tokens[:2], loss[:2]), make_rows(tokens[2:], loss[2:])], V)
    pairs: dict[tuple[int, int], int] = {}
    contexts, unigrams = [0] * V, [0] * V
    for row, counted in zip(tokens.tolist(), loss.tolist(), strict=True):
        for i in range(1, len(row)):
            if counted[i]:
                pairs[row[i - 1], row[i]] = pairs.get((row[i - 1], row[i]), 0) + 1
                contexts[row[i - 1]] += 1
                unigrams[row[i]] += 1
    total = sum(unigrams)
    nats = targets = 0
    for s in range(V):
        for t in range(V):
            bucket = math.ceil(math.log2(contexts[s] + 1))
            weight = model.bigram_weights[bucket]
            lower = (1 - model.uniform_weight) * unigrams[t] / total + model.uniform_weight / V
            expected = weight * pairs.get((s, t), 0) / max(1, contexts[s]) + (1 - weight) * lower
            assert model.probabilities(np.array([s]), np.array([t]))[0] == pytest.approx(expected)
            nats -= pairs.get((s, t), 0) * math.log(expected)
            targets += pairs.get((s, t), 0)
    score = model.score([make_rows(tokens, loss)])
    assert score.targets == targets == total
    assert score.nats == pytest.approx(nats)
    assert score.nats_per_token == pytest.approx(nats / targets)
    assert score.bits_per_byte(100) == pytest.approx(nats / math.log(2) / 100)


def test_reaches_the_entropy_of_a_markov_chain_and_beats_the_unigram():
    rng = np.random.default_rng(1)
    table = rng.dirichlet(np.full(V, 0.3), V)
    train, test = chain(rng, 60, 100, table), chain(rng, 30, 100, table)
    score = BigramModel([make_rows(train)], V).score([make_rows(test)])
    before, after = test[:, :-1].ravel(), test[:, 1:].ravel()
    best = -np.log(table[before, after]).mean()
    unigram = np.bincount(train[:, 1:].ravel(), minlength=V) + 0.1
    alone = -np.log(unigram / unigram.sum())[after].mean()
    assert best - 0.05 < score.nats_per_token < best + 0.05 < alone


def test_interpolation_is_fitted_not_assumed():
    """Where the context says nothing the bigram gets little weight; where it says all, nearly all."""
    rng = np.random.default_rng(2)
    noise = BigramModel([make_rows(rng.integers(0, 50, (20, 50)))], 50)
    cycle = BigramModel([make_rows((np.arange(20)[:, None] + np.arange(50)) % 50)], 50)
    bucket = math.ceil(math.log2(20 + 1))  # each context is seen about 20 times
    assert noise.bigram_weights[bucket] < 0.3
    assert cycle.bigram_weights[bucket] > 0.9
    assert cycle.bigram_weights[bucket + 1] > 0.9  # never met in fitting


def test_positions_without_loss_padding_and_row_starts_are_no_targets():
    tokens = np.array([[1, 2, 3, 0]])
    rows = Rows(
        tokens.astype(np.int32), np.array([[0, 0, 0, -1]], np.int32), np.array([[1, 0, 1, 1]], np.uint8)
    )
    model = BigramModel([make_rows(np.arange(20).reshape(2, 10) % V)], V)
    assert model.score([rows]).targets == 1
    assert BigramModel([], V).score([rows]).nats == pytest.approx(math.log(V), rel=1e-3)
