"""Union-find: which documents belong together once some pairs are known to."""

import numpy as np


class Clusters:
    """Disjoint sets of the numbers 0 to n-1."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, one: int) -> int:
        """The number that stands for the set of `one`."""
        root = one
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[one] != root:  # shorten the path for the next look-up
            self._parent[one], one = root, self._parent[one]
        return root

    def join(self, one: int, other: int) -> None:
        """Make one set of two."""
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first

    def roots(self) -> np.ndarray:
        """[n] int64: the root of each number."""
        return np.asarray([self.find(one) for one in range(len(self._parent))], dtype=np.int64)
