"""Token shards: packed rows in safetensors files of bounded size.

A folder holds 00000.safetensors, 00001.safetensors, ... with tokens, segments and loss as in
`data.packing.Rows`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from data.packing import Rows
from infra.errors import HeadwaterError
from infra.files import write_tensors

# About 38 MB a file at 9 bytes a token: small enough to hold several in memory, large enough to stream.
TOKENS_PER_SHARD = 1 << 22
_KINDS = {"tokens": "I32", "segments": "I32", "loss": "U8"}


class ShardWriter:
    """Writes rows to a folder as they come; holds at most one shard in memory."""

    def __init__(self, folder: Path, sequence_length: int, tokens_per_shard: int = TOKENS_PER_SHARD) -> None:
        self.folder = folder
        self.rows_per_shard = max(1, tokens_per_shard // sequence_length)
        self.rows = 0
        self._files = 0
        self._waiting: list[Rows] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Rows) -> None:
        """Append rows; full shards are written out at once."""
        self._waiting.append(rows)
        self.rows += len(rows.tokens)
        while sum(len(part.tokens) for part in self._waiting) >= self.rows_per_shard:
            self._write(self.rows_per_shard)

    def close(self) -> int:
        """Write what is left and return the number of rows in the folder."""
        if left := sum(len(part.tokens) for part in self._waiting):
            self._write(left)
        return self.rows

    def _write(self, count: int) -> None:
        whole = {name: np.concatenate([getattr(part, name) for part in self._waiting]) for name in _KINDS}
        write_tensors(
            self.folder / f"{self._files:05d}.safetensors",
            {name: array[:count] for name, array in whole.items()},
        )
        self._files += 1
        self._waiting = [Rows(**{name: array[count:] for name, array in whole.items()})]


class ShardReader:
    """Random access to the rows of a folder of shards; the files stay mapped, rows are read when asked for.

    Raises HeadwaterError when the folder has no shards, or a file is torn, of another width or another type.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise HeadwaterError(
                f"no token shards (*.safetensors) in {self.folder}; build the pack stage first"
            )
        self._shards = []
        starts = [0]
        width = 0
        for path in files:
            try:
                shard = safe_open(path, framework="np")
                slices = {name: shard.get_slice(name) for name in _KINDS}
            except (SafetensorError, OSError) as error:
                raise HeadwaterError(f"{path} is not a readable token shard: {error}") from error
            rows, width_here = slices["tokens"].get_shape()
            for name, kind in _KINDS.items():
                if slices[name].get_dtype() != kind or slices[name].get_shape() != [rows, width_here]:
                    raise HeadwaterError(
                        f"{path}: {name} is {slices[name].get_dtype()}{slices[name].get_shape()}, "
                        f"expected {kind}[{rows}, {width_here}]"
                    )
            if width and width_here != width:
                raise HeadwaterError(
                    f"{path} has rows of {width_here} tokens, the shards before it of {width}"
                )
            width = width_here
            starts.append(starts[-1] + rows)
            self._shards.append((shard, slices))
        self.sequence_length: int = width
        self.rows: int = starts[-1]
        self._starts = np.asarray(starts)

    def read(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at the given indices, in that order."""
        places = np.asarray(indices, dtype=np.int64)
        if len(places) and not (places.min() >= 0 and places.max() < self.rows):
            raise HeadwaterError(f"row index out of range: {self.folder} has {self.rows} rows")
        shape = (len(places), self.sequence_length)
        out = {
            "tokens": np.empty(shape, dtype=np.int32),
            "segments": np.empty(shape, dtype=np.int32),
            "loss": np.empty(shape, dtype=np.uint8),
        }
        files = np.searchsorted(self._starts, places, side="right") - 1
        for at, (file, place) in enumerate(zip(files, places, strict=True)):
            row = int(place - self._starts[file])
            for name, slices in self._shards[file][1].items():
                out[name][at] = slices[row]
        return Rows(**out)
