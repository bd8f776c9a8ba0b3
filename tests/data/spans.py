"""What fill in the middle did, undone: the oracle of its tests."""

import numpy as np

from data.chat import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE


def restore(ids: np.ndarray) -> np.ndarray:
    """Put a span back in reading order, BOS prefix middle suffix EOS; AssertionError unless it is whole."""
    places = [np.flatnonzero(ids == token) for token in (BOS, FIM_BEGIN, FIM_HOLE, FIM_END, EOS)]
    assert all(len(place) == 1 for place in places), "each control token once"
    bos, begin, hole, end, eos = (int(place[0]) for place in places)
    assert bos == 0 < begin == 1 < hole < end < eos == len(ids) - 1, "control tokens in order"
    return np.concatenate(
        [ids[:1], ids[begin + 1 : hole], ids[end + 1 : eos], ids[hole + 1 : end], ids[eos:]]
    )
