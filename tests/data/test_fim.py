import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.boundary import BoundarySplitter
from data.chat import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, SPECIALS
from data.fim import chosen, chunks, fim_pieces, is_fim
from infra.errors import HeadwaterError
from tests.data.spans import restore


@given(text=st.text(max_size=400), name=st.text(max_size=8), seed=st.integers(0, 5))
def test_fim_is_invertible_whole_and_never_longer_than_the_row(chat, text, name, seed):
    def encode(part: str) -> np.ndarray:
        return np.asarray(chat.encode(part), dtype=np.int32)

    pieces = fim_pieces(text, name, encode, capacity=64, seed=seed)
    assert all(len(piece) <= 64 for piece in pieces)
    for piece in pieces:
        assert is_fim(piece)
        assert [i for i in piece if i < len(SPECIALS)] == [BOS, FIM_BEGIN, FIM_HOLE, FIM_END, EOS]
    assert "".join(chat.decode(restore(piece)) for piece in pieces) == text
    again = fim_pieces(text, name, encode, capacity=64, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(pieces, again, strict=True))


def test_a_document_that_fits_stays_in_one_span(chat):
    text = "def f(x):\n    return x\n"
    pieces = fim_pieces(text, "a", lambda t: np.asarray(chat.encode(t), np.int32), 4096, seed=0)
    assert len(pieces) == 1


def test_long_documents_are_cut_before_the_rewrite_and_fill_their_rows(chat):
    text = "".join(f"line {i} says {i * 7}\n" for i in range(600))
    encode = lambda t: np.asarray(chat.encode(t), np.int32)  # noqa: E731
    pieces = fim_pieces(text, "long", encode, 256, seed=0)
    assert len(pieces) > 5
    assert "".join(chat.decode(restore(piece)) for piece in pieces) == text
    assert np.mean([len(piece) for piece in pieces]) > 256 / 2


@given(text=st.text(min_size=1, max_size=200), parts=st.integers(1, 50))
def test_chunks_join_to_the_text(text, parts):
    cut = chunks(text, parts)
    assert "".join(cut) == text
    assert len(cut) == min(parts, len(text))
    assert all(cut)


def test_rate_is_kept_and_does_not_depend_on_order():
    names = [f"doc{i}" for i in range(20000)]
    picked = [name for name in names if chosen(name, 0.1, seed=3)]
    assert 0.09 < len(picked) / len(names) < 0.11
    assert [name for name in reversed(names) if chosen(name, 0.1, seed=3)] == picked[::-1]
    assert picked != [name for name in names if chosen(name, 0.1, seed=4)]
    assert not any(chosen(name, 0.0, seed=3) for name in names)
    assert all(chosen(name, 1.0, seed=3) for name in names)


def test_a_row_too_short_for_a_span_is_refused(chat):
    with pytest.raises(HeadwaterError, match="cannot hold FIM"):
        fim_pieces("x", "a", lambda t: np.asarray(chat.encode(t), np.int32), 8, seed=0)


def test_combined_tokens_split_at_the_asked_rate_and_spell_the_same(chat):
    text = "f(x):\n    g(y)\n\nh = {1,\n2}\n" * 400
    ids = np.asarray(chat.encode(text), np.int32)
    splitter = BoundarySplitter(chat, 0.25, seed=1)
    assert splitter.parts  # the vocabulary has joined punctuation and line breaks
    combined = int(np.isin(ids, list(splitter.parts)).sum())
    assert combined > 400
    out = splitter.split(ids, "doc")
    assert chat.decode(out) == text
    left = int(np.isin(out, list(splitter.parts)).sum())
    assert 0.70 < left / combined < 0.80
    assert np.array_equal(out, splitter.split(ids, "doc"))
    assert not np.array_equal(out, splitter.split(ids, "other"))
    whole = BoundarySplitter(chat, 1.0, seed=1).split(ids, "doc")
    assert not np.isin(whole, list(splitter.parts)).any()
    assert BoundarySplitter(chat, 0.0, seed=1).split(ids, "doc") is ids
