"""MinHash signatures and the bands in which near-duplicates meet (Broder 1997).

The smallest value of a random hash over a set is equal for two sets with a probability that is their Jaccard
similarity s. With b bands of r such minima, two documents share a band with probability 1 - (1 - s^r)^b:
for 14 bands of 8 that is 0.77 at s = 0.75 and 0.92 at s = 0.8.
"""

import numba
import numpy as np

from data.hashing import generator

_HIGH = np.uint64(32)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(31)


class MinHash:
    """A family of `bands * rows` hash functions, fixed by `seed`."""

    def __init__(self, bands: int, rows: int, seed: int = 0) -> None:
        self.bands = bands
        self.rows = rows
        draw = generator("minhash", seed)
        size = bands * rows
        # Multiply-shift hashing wants odd multipliers.
        self._multiply = draw.integers(0, 2**64, size, dtype=np.uint64) | np.uint64(1)
        self._add = draw.integers(0, 2**64, size, dtype=np.uint64)

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """[bands * rows] uint32 of a set of uint64."""
        return _signature(shingles, self._multiply, self._add)

    def band_keys(self, signatures: np.ndarray) -> np.ndarray:
        """[documents, bands] uint64: what two documents must share to be compared."""
        parts = signatures.reshape(len(signatures), self.bands, self.rows)
        key = np.zeros(parts.shape[:2], dtype=np.uint64)
        for row in range(self.rows):
            key = (key ^ parts[:, :, row].astype(np.uint64)) * _STEP
            key ^= key >> _SHIFT
        return key


@numba.njit(cache=True)
def _signature(shingles, multiply, add):  # pragma: no cover - compiled
    out = np.full(len(multiply), 0xFFFFFFFF, np.uint32)
    for i in range(len(shingles)):
        value = shingles[i]
        for j in range(len(multiply)):
            hashed = np.uint32((multiply[j] * value + add[j]) >> _HIGH)
            if hashed < out[j]:
                out[j] = hashed
    return out
