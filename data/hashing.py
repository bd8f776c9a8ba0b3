"""Deterministic choices: a "random" decision about a document is a hash of its name, never of its place.

A choice that depends on the order of documents changes when one of them is added or when two workers
share the work. Hashing (purpose, seed, id) instead makes each choice stand alone: the same document is
held out, cut in the middle or sampled in every run, on every machine and in any order.
"""

import hashlib

import numpy as np

_SCALE = float(1 << 53)


def hash64(*parts: str | int) -> int:
    """64-bit hash of the parts. The parts are length-prefixed, so ("ab", "c") and ("a", "bc") differ."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = str(part).encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return int.from_bytes(state.digest(), "little")


def unit(*parts: str | int) -> float:
    """Uniform number in [0, 1) from the parts, the same everywhere."""
    return (hash64(*parts) >> 11) / _SCALE


def generator(*parts: str | int) -> np.random.Generator:
    """Numpy generator keyed by the parts.

    Its bits are fixed; how numpy makes integers and permutations of them may change with numpy's version,
    which is one of the versions that a record names.
    """
    return np.random.Generator(np.random.Philox(key=hash64(*parts)))
