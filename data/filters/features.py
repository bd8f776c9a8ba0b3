"""What the filters look at, computed once for each document and only when asked for.

Words are what white space separates. That is the definition of the Gopher rules, needs no language, and
splits at hundreds of MB/s where a linguistic tokenizer takes most of the time of the whole chain.
"""

from functools import cached_property

import numpy as np
import regex
from datatrove.utils.text import PUNCTUATION_SET

from data.filters.repetition_counts import duplicate_chars, top_chars

# English stop words of the Gopher rules.
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
NON_SYMBOL, ALPHABETIC, STOP, ENCODED = 1, 2, 4, 8
# A line of base64, or a byte in a table of bytes ("0x1f,", "\\x1f\\x2e").
_ENCODED = regex.compile(r"[A-Za-z0-9+/=]{60,}|[{(\[]?(?:(?:0x|\\x)[0-9a-fA-F]{2,}[,;]?)+[})\]]?[,;]?")
_MOST_WORDS = 1 << 21


class WordTable(dict[str, int]):
    """Numbers every word it meets and keeps its length and flags, so that a word is examined once a run.

    Shared by all documents of a chain. Grows with the vocabulary and starts afresh at two million words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths = np.zeros(1 << 12, dtype=np.int64)
        self.flags = np.zeros(1 << 12, dtype=np.uint8)

    def __missing__(self, word: str) -> int:
        place = len(self)
        if place == len(self.lengths):
            self.lengths = np.concatenate([self.lengths, np.zeros_like(self.lengths)])
            self.flags = np.concatenate([self.flags, np.zeros_like(self.flags)])
        self[word] = place
        self.lengths[place] = len(word)
        self.flags[place] = (
            NON_SYMBOL * any(letter not in PUNCTUATION_SET for letter in word)
            + ALPHABETIC * any(letter.isalpha() for letter in word)
            + STOP * (word in STOP_WORDS)
            + ENCODED * bool(_ENCODED.fullmatch(word))
        )
        return place

    def number(self, words: list[str]) -> np.ndarray:
        if len(self) > _MOST_WORDS:
            self.clear()
        return np.fromiter(map(self.__getitem__, words), np.int64, len(words))


class Features:
    """A document as the filters see it."""

    def __init__(self, text: str, table: WordTable) -> None:
        self.text = text
        self._table = table

    @cached_property
    def words(self) -> np.ndarray:
        """[words] int64: which word stands where, as numbered by the table."""
        return self._table.number(self.text.split())

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """[words] int64, in characters."""
        words = self.words  # first: it may grow the table
        return self._table.lengths[words]

    @cached_property
    def word_flags(self) -> np.ndarray:
        """[words] uint8: NON_SYMBOL, ALPHABETIC, STOP, ENCODED."""
        words = self.words
        return self._table.flags[words]

    @cached_property
    def stop_words(self) -> int:
        """How many different stop words occur."""
        return len(np.unique(self.words[(self.word_flags & STOP) > 0]))

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    def top_ngram_chars(self, n: int) -> int:
        """Characters in all occurrences of the most frequent n-gram of words, with the spaces inside it."""
        return int(top_chars(self.words, self.word_lengths, n))

    def duplicate_ngram_chars(self, n: int) -> int:
        """Characters in n-grams of words that occurred before, each character counted once."""
        return int(duplicate_chars(self.words, self.word_lengths, n))


def duplicates(parts: list[str]) -> tuple[int, int]:
    """How many of the parts occurred before, and their characters."""
    seen: set[str] = set()
    count = chars = 0
    for part in parts:
        if part in seen:
            count += 1
            chars += len(part)
        else:
            seen.add(part)
    return count, chars
