"""Counting repeated n-grams of words, compiled: in Python these loops take most of the filters' time."""

import numba
import numpy as np

# Odd multipliers of the 64-bit mixers in the public domain (Knuth's and splitmix64's).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)
_ONE = np.uint64(1)


@numba.njit(cache=True)
def _hash(words, start, n):  # pragma: no cover - compiled
    """64-bit hash of n words from `start`, never 0; two different n-grams share one with chance 2^-63."""
    value = np.uint64(0)
    for i in range(start, start + n):
        value = (value ^ np.uint64(words[i] + 1)) * _STEP
        value = (value ^ (value >> _SHIFT)) * _MIX
    return value | _ONE


@numba.njit(cache=True)
def _table_size(count):  # pragma: no cover - compiled
    size = 16
    while size < 2 * count:
        size *= 2
    return size


@numba.njit(cache=True)
def duplicate_chars(words, lengths, n):  # pragma: no cover - compiled
    """Read on from left to right: an n-gram seen before adds its characters and is skipped as a whole."""
    count = len(words) - n + 1
    if count < 2:
        return 0
    size = _table_size(count)
    table = np.zeros(size, np.uint64)
    chars = 0
    i = 0
    while i < count:
        value = _hash(words, i, n)
        slot = np.int64((value >> np.uint64(17)) & np.uint64(size - 1))
        while table[slot] != 0 and table[slot] != value:
            slot = (slot + 1) & (size - 1)
        if table[slot] == value:
            for j in range(i, i + n):
                chars += lengths[j]
            i += n
        else:
            table[slot] = value
            i += 1
    return chars


@numba.njit(cache=True)
def top_chars(words, lengths, n):  # pragma: no cover - compiled
    """Occurrences of the most frequent n-gram (the first of equals) times its length with single spaces."""
    count = len(words) - n + 1
    if count < 1:
        return 0
    size = _table_size(count)
    table = np.zeros(size, np.uint64)
    first = np.zeros(size, np.int64)
    times = np.zeros(size, np.int64)
    best = 0
    for i in range(count):
        value = _hash(words, i, n)
        slot = np.int64((value >> np.uint64(17)) & np.uint64(size - 1))
        while table[slot] != 0 and table[slot] != value:
            slot = (slot + 1) & (size - 1)
        if table[slot] == 0:
            table[slot] = value
            first[slot] = i
        times[slot] += 1
        best = max(best, times[slot])
    start = len(words)
    for slot in range(size):
        if times[slot] == best and first[slot] < start:
            start = first[slot]
    chars = n - 1
    for j in range(start, start + n):
        chars += lengths[j]
    return best * chars
