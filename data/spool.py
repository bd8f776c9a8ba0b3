"""Arrays of many lengths on disk instead of in memory.

Token ids and shingle sets of a corpus are larger than the text they come from. A spool appends them to one
scratch file and keeps only where each begins; reading maps the file, so the operating system decides what
stays in memory.
"""

from pathlib import Path

import numpy as np


class Spool:
    """Append arrays of one type, then read them back by number. 8 bytes an array stay in memory.

    The file is scratch: it is made afresh by each Spool and removed by `close`.
    """

    def __init__(self, path: Path, dtype: np.dtype | type) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._ends: list[int] = [0]
        self._map: np.ndarray | None = None

    def append(self, array: np.ndarray) -> int:
        """Store an array and return its number."""
        self._file.write(np.ascontiguousarray(array, dtype=self.dtype).data)
        self._ends.append(self._ends[-1] + len(array))
        self._map = None
        return len(self._ends) - 2

    def __len__(self) -> int:
        return len(self._ends) - 1

    def lengths(self) -> np.ndarray:
        """[arrays] int64."""
        return np.diff(np.asarray(self._ends, dtype=np.int64))

    def __getitem__(self, number: int) -> np.ndarray:
        """A stored array, read-only, mapped from the file."""
        if not 0 <= number < len(self):
            raise IndexError(f"no array {number} in {self.path}, which holds {len(self)}")
        if self._map is None:
            self._file.flush()
            empty = self._ends[-1] == 0
            self._map = np.empty(0, self.dtype) if empty else np.memmap(self.path, self.dtype, "r")
        return self._map[self._ends[number] : self._ends[number + 1]]

    def close(self) -> None:
        """Remove the file."""
        self._map = None
        self._file.close()
        self.path.unlink(missing_ok=True)
