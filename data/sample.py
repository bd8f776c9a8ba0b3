"""Samples of texts for training a tokenizer, chosen by hash."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from data.documents import iter_tables
from data.gather import read_problems
from data.hashing import hash64, unit
from data.heldout import texts_of

# Text kept back to measure on, as a share of the sample.
_REST = 0.05


def text_sample(folder: Path, size: int, seed: int) -> tuple[list[str], list[str]]:
    """(sample, rest): documents of about `size` bytes in the order of their hash, and some of those after
    them.

    Holds the two samples in memory. If the documents are fewer than asked for, all but the rest are taken.
    """
    sizes: dict[str, int] = {}
    for batch in iter_tables(folder, ("id", "text")):
        lengths = pc.binary_length(batch.column("text")).to_pylist()
        sizes.update(zip(batch.column("id").to_pylist(), lengths, strict=True))
    order = sorted(sizes, key=lambda name: (hash64("tokenizer", seed, name), name))
    sums = np.cumsum([sizes[name] for name in order])
    size = min(size, int((1 - _REST) * sums[-1]))
    end = max(1, int(np.searchsorted(sums, size, side="right")))
    further = max(end, int(np.searchsorted(sums, sums[end - 1] + _REST * size, side="left")) + 1)
    wanted = {name: place for place, name in enumerate(order[:further])}
    found = {wanted[name]: text for batch in texts_of(folder, wanted) for name, text in batch}
    texts = [found[place] for place in range(len(found))]
    return texts[:end], texts[end:]


def problem_sample(files: Sequence[Path], size: int, seed: int) -> list[str]:
    """Texts of problems of about `size` bytes, an even share from each family."""
    families = read_problems(files) if size else {}
    texts: list[str] = []
    for problems in families.values():
        left = size / len(families)
        for one in sorted(problems, key=lambda one: unit("tokenizer", seed, one.id)):
            if left <= 0:
                break
            parts = [part for part in (one.system, one.prompt, one.thought, one.answer) if part]
            left -= sum(len(part.encode("utf-8")) for part in parts)
            texts += parts
    return texts
