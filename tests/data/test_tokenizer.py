import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import END_THINK, SPECIALS, THINK, ChatTokenizer, byte_of_letter
from data.tokenizer import SMALLEST_VOCABULARY, measure, pretokenizer, train
from infra.errors import HeadwaterError

TEXTS = [f"def f{i}(x):\n    return x + {i}; # {'word ' * (i % 7)}\n\n" for i in range(200)]

# Pieces worked out by hand from the three published expressions.
PIECES = {
    "12345": ["123", "45"],
    "x=(1);\n\ny": ["x", "=(", "1", ");\n\n", "y"],
    "日本語のtext": ["日本語の", "text"],
    "  two words": [" ", " two", " words"],
    ".append(x)": [".append", "(x", ")"],
    "a\n\n  b": ["a", "\n\n", " ", " b"],
    "</think>": ["</", "think", ">"],
}


def pieces(text: str, max_digits: int = 3) -> list[str]:
    table = byte_of_letter()
    cut = pretokenizer(max_digits).pre_tokenize_str(text)
    return [bytes(table[letter] for letter in piece).decode() for piece, _ in cut]


@pytest.mark.parametrize("text", PIECES)
def test_pretokenizer_cuts_as_the_released_one(text):
    assert pieces(text) == PIECES[text]


def test_digits_can_be_kept_single():
    assert pieces("12345", max_digits=1) == list("12345")


@given(text=st.text())
def test_pretokenizer_loses_nothing(text):
    table = byte_of_letter()
    cut = pretokenizer().pre_tokenize_str(text)
    assert b"".join(bytes(table[letter] for letter in piece) for piece, _ in cut) == text.encode()


def test_control_tokens_take_the_first_ids_and_every_byte_is_there():
    spec = json.loads(train(TEXTS, 300))
    vocabulary = spec["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(300))
    assert [vocabulary[content] for content in SPECIALS] == list(range(len(SPECIALS)))
    assert set(byte_of_letter()) <= set(vocabulary)
    assert {e["id"] for e in spec["added_tokens"] if not e["special"]} == {THINK, END_THINK}


def test_training_does_not_depend_on_the_order_of_texts():
    shuffled = list(TEXTS)
    random.Random(1).shuffle(shuffled)
    assert train(shuffled, 400) == train(TEXTS, 400)


def test_vocabulary_too_small_says_the_least():
    with pytest.raises(HeadwaterError, match=str(SMALLEST_VOCABULARY)):
        train(TEXTS, SMALLEST_VOCABULARY - 1)


def test_measure_counts_bytes_tokens_and_failures(chat: ChatTokenizer):
    texts = ["héllo wörld", "", "日本 \ud7ff\u200b\ufeff", "x" * 1000]
    fit = measure(chat, texts, batch=3)
    assert fit.bytes == sum(len(t.encode()) for t in texts)
    assert fit.tokens == sum(len(chat.encode(t)) for t in texts)
    assert fit.failures == 0
    assert fit.bytes_per_token == fit.bytes / fit.tokens
