"""Which documents are held out, decided by hash before anything is encoded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from data.documents import iter_tables, origin_of
from data.hashing import unit
from infra.errors import HeadwaterError

_BATCH = 256


@dataclass(frozen=True)
class TextList:
    """Which documents there are, without their texts."""

    train: list[str]  # ids, sorted
    sizes: list[int]  # bytes of text of each of them
    heldout: list[str]  # ids, in the order of their hash


def divide(folder: Path, share: float) -> TextList:
    """Divide documents into training and held-out by the hash of the file they come from.

    Not of the document: the code and the docstrings of one module must go the same way, or the model is
    tested on the manual of what it has read. At least one file goes either way, however small the share.

    Raises HeadwaterError when the documents come from fewer than two files.
    """
    found: dict[str, tuple[str, int]] = {}
    for batch in iter_tables(folder, ("id", "path", "text")):
        columns = (batch.column("id"), batch.column("path"), pc.binary_length(batch.column("text")))
        for name, path, size in zip(*(column.to_pylist() for column in columns), strict=True):
            found[name] = (origin_of(path), size)
    chance = {origin: unit("heldout", origin) for origin in sorted({origin for origin, _ in found.values()})}
    if len(chance) < 2:
        raise HeadwaterError(
            f"{folder} holds documents of {len(chance)} file: at least two are needed, one of them to hold "
            "out; give ingest more files, or records"
        )
    line = max(share, min(chance.values()))
    line = min(line, float(np.nextafter(max(chance.values()), 0.0)))
    train = sorted(name for name, (origin, _) in found.items() if chance[origin] > line)
    held = [name for name, (origin, _) in found.items() if chance[origin] <= line]
    held.sort(key=lambda name: (chance[found[name][0]], name))
    return TextList(train, [found[name][1] for name in train], held)


def texts_of(folder: Path, wanted: Mapping[str, int]) -> Iterator[list[tuple[str, str]]]:
    """Batches of (id, text) of the wanted documents, in stored order."""
    waiting: list[tuple[str, str]] = []
    for batch in iter_tables(folder, ("id", "text")):
        for place, name in enumerate(batch.column("id").to_pylist()):
            if name in wanted:
                waiting.append((name, batch.column("text")[place].as_py()))
            if len(waiting) == _BATCH:
                yield waiting
                waiting = []
    if waiting:
        yield waiting
