import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import PAD
from data.packing import Piece, pack, rows_from
from infra.errors import HeadwaterError

LENGTHS = st.integers(1, 200).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))
)


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Free space of each row, by looking at every row for every piece."""
    free: list[int] = []
    for size in sorted(lengths, reverse=True):
        open_rows = [row for row, space in enumerate(free) if space >= size]
        if open_rows:
            free[min(open_rows, key=lambda row: free[row])] -= size
        else:
            free.append(capacity - size)
    return sorted(free)


@given(case=LENGTHS, ordered_below=st.integers(0, 100))
def test_every_piece_lands_once_and_rows_hold(case, ordered_below):
    capacity, lengths = case
    rows = pack(lengths, capacity, ordered_below)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)


@given(case=LENGTHS)
def test_equals_the_naive_best_fit_decreasing(case):
    capacity, lengths = case
    free = sorted(capacity - sum(lengths[i] for i in row) for row in pack(lengths, capacity))
    assert free == naive_best_fit_decreasing(lengths, capacity)


def test_short_pieces_keep_their_order_when_asked():
    lengths = [3, 60, 1, 2, 3, 50, 1]
    rows = pack(lengths, 64, ordered_below=10)
    short = [[i for i in row if lengths[i] < 10] for row in rows]
    assert all(row == sorted(row) for row in short)
    assert rows == pack(lengths, 64, ordered_below=10)


def test_fill_is_nearly_whole_on_document_like_lengths():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 20000).astype(int) + 1, 4096)
    rows = pack(lengths, 4096)
    assert len(rows) <= 1.001 * lengths.sum() / 4096 + 1


@pytest.mark.parametrize("wrong", [0, 65, -1])
def test_a_piece_that_cannot_fit_is_an_error(wrong):
    with pytest.raises(HeadwaterError, match=f"piece 1 has {wrong} tokens"):
        pack([5, wrong], 64)


@given(lengths=st.lists(st.integers(1, 32), max_size=30))
def test_rows_hold_every_token_once_with_its_segment_and_loss(lengths):
    rng = np.random.default_rng(len(lengths))
    pieces = [
        Piece(rng.integers(10, 99, n).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8))
        for n in lengths
    ]
    rows = rows_from(pieces, 32)
    found = []
    for tokens, segments, loss in zip(rows.tokens, rows.segments, rows.loss, strict=True):
        for segment in range(segments.max() + 1):
            here = segments == segment
            assert np.all(np.diff(np.flatnonzero(here)) == 1)  # unbroken
            found.append((tokens[here].tolist(), loss[here].tolist()))
        empty = segments == -1
        assert np.all(tokens[empty] == PAD)
        assert not loss[empty].any()
    assert sorted(found) == sorted((p.ids.tolist(), p.loss.tolist()) for p in pieces)
    if pieces:
        assert rows.fill == pytest.approx(sum(lengths) / rows.tokens.size)
