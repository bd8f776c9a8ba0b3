"""Documents as sets: a document is the set of its runs of n words, each as a 64-bit hash.

Words are runs of letters and digits in lower case, so that white space, punctuation and case make no
difference. The hashes are the same in every process (Python's own are not), so an index can be kept.
"""

import hashlib
import re
import unicodedata

import numba
import numpy as np

_WORD = re.compile(r"\w+")
_MOST_WORDS = 1 << 21
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)


class WordHashes(dict[str, int]):
    """63-bit hash of each word, computed once a run; starts afresh at two million words."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_WORDS:
            self.clear()
        raw = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(raw, "little") >> 1
        return value

    def of(self, words: list[str]) -> np.ndarray:
        """[words] uint64."""
        return np.fromiter(map(self.__getitem__, words), np.int64, len(words)).view(np.uint64)


def split_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@numba.njit(cache=True)
def ngram_hashes(words, n):  # pragma: no cover - compiled
    """[len(words) - n + 1] uint64: the hash of every run of n words, in order."""
    count = len(words) - n + 1
    out = np.empty(max(count, 0), np.uint64)
    for i in range(count):
        value = np.uint64(n)
        for j in range(i, i + n):
            value = (value ^ words[j]) * _STEP
            value = (value ^ (value >> _SHIFT)) * _MIX
        out[i] = value ^ (value >> _SHIFT)
    return out


def shingles(text: str, n: int, table: WordHashes) -> np.ndarray:
    """The sorted set of n-word runs as uint64; a text of fewer words is one run; a text without words is
    empty."""
    words = table.of(split_words(text))
    if not len(words):
        return words
    return np.unique(ngram_hashes(words, min(n, len(words))))


def exact_key(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space and Unicode composition only."""
    plain = text if text.isascii() else unicodedata.normalize("NFC", text)
    return hashlib.sha256(" ".join(plain.split()).encode("utf-8")).digest()[:16]


@numba.njit(cache=True)
def jaccard(a, b):  # pragma: no cover - compiled
    """Shared part of two sorted sets: |a and b| / |a or b|."""
    i = j = both = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            both += 1
            i += 1
            j += 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    either = len(a) + len(b) - both
    return both / either if either else 0.0
