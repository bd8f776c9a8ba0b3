from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixture import draw, nearest, shares
from infra.errors import ConfigError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def test_the_budget_is_shared_by_weight():
    assert shares({"text": 0.2, "sum": 0.6, "sort": 0.0}, ["text", "sum", "sort", "unused"], 1000) == {
        "sum": 750,
        "text": 250,
    }


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"texts": 1.0}, "no 'texts' among the inputs; did you mean text"),
        ({"text": -1.0}, "mixture.text: a weight cannot be negative"),
        ({"text": 0.0}, "above 0"),
        ({}, "above 0"),
    ],
)
def test_wrong_mixtures_are_named(weights, message):
    with pytest.raises(ConfigError, match=message):
        shares(weights, ["text", "sum"], 100)


@given(sizes=SIZES, target=st.integers(0, 2000), seed=st.integers(0, 3))
def test_a_draw_goes_through_the_source_evenly(sizes, target, seed):
    tokens = np.asarray(sizes)
    taken = draw("text", tokens, target, seed)
    total = int(tokens[taken.documents].sum())
    assert total >= target
    if target:
        assert total - tokens[taken.documents[-1]] < target  # no document more than needed
    counts = Counter(taken.documents.tolist())
    if counts:
        times = [counts[i] for i in range(len(sizes))]
        assert max(times) - min(times) <= 1
        assert taken.epochs == pytest.approx(np.mean(times))
    assert np.array_equal(taken.documents, draw("text", tokens, target, seed).documents)


def test_epochs_and_seeds_have_orders_of_their_own():
    tokens = np.ones(50, dtype=np.int64)
    taken = draw("text", tokens, 100, 0).documents
    assert sorted(taken[:50]) == sorted(taken[50:]) == list(range(50))
    assert taken[:50].tolist() != taken[50:].tolist()
    assert taken[:50].tolist() != draw("text", tokens, 50, 1).documents.tolist()
    assert taken[:50].tolist() != draw("sum", tokens, 50, 0).documents.tolist()


def test_a_larger_target_takes_the_same_documents_and_more():
    tokens = np.arange(1, 60)
    few, many = draw("text", tokens, 300, 0).documents, draw("text", tokens, 900, 0).documents
    assert many[: len(few)].tolist() == few.tolist()


def test_a_source_with_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"mixture\.sum: it has a weight but nothing"):
        draw("sum", np.empty(0, dtype=np.int64), 10, 0)


@given(sizes=SIZES, target=st.integers(0, 800))
def test_nearest_is_the_best_prefix(sizes, target):
    count = nearest(np.asarray(sizes), target)
    gaps = [abs(sum(sizes[:i]) - target) for i in range(len(sizes) + 1)]
    assert gaps[count] == min(gaps)
