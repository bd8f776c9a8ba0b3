"""Keep the evaluation out of the training text.

DeepSeek-R1 dropped every text that contains a run of ten words of an evaluation question or solution; so do
we. Words are runs of letters and digits in lower case. A question shorter than ten words has no such run:
it is looked for as a whole, if it has enough words for a match to mean anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.dedup.shingles import WordHashes, ngram_hashes, split_words
from data.documents import iter_documents
from infra.errors import HeadwaterError


@dataclass(frozen=True)
class Match:
    """Where a document repeats an evaluation text."""

    problem: str  # id of the problem
    ngram: str  # the shared words


@dataclass(frozen=True, eq=False)
class _Table:
    """Runs of `length` words of the evaluation texts, sorted by hash."""

    length: int
    hashes: np.ndarray  # [runs] uint64, sorted, each once
    text: np.ndarray  # [runs] int64, which text it stands in
    place: np.ndarray  # [runs] int64, from which word


class Contamination:
    """Looks for runs of `ngram` words of the evaluation texts in documents.

    Texts of fewer words, but at least `min_words`, are looked for whole. In memory: the evaluation texts, and
    24 bytes for each run of words in them.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], ngram: int = 10, min_words: int = 6) -> None:
        """`texts` are (problem id, text) pairs; a problem may have several."""
        self._hashes = WordHashes()
        self._problems: list[str] = []
        self._words: list[list[str]] = []
        runs: dict[int, list[tuple[np.ndarray, int]]] = {}
        for problem, text in sorted(set(texts)):
            words = split_words(text)
            length = min(ngram, len(words))
            if length < min(min_words, ngram) or not words:
                continue
            runs.setdefault(length, []).append(
                (ngram_hashes(self._hashes.of(words), length), len(self._words))
            )
            self._problems.append(problem)
            self._words.append(words)
        self._tables = [_table(length, found) for length, found in sorted(runs.items(), reverse=True)]

    @property
    def texts(self) -> int:
        """Evaluation texts that are looked for (some may be too short)."""
        return len(self._words)

    def find(self, text: str) -> Match | None:
        """The first shared run of the longest kind, None if there is none."""
        words = split_words(text)
        hashes = self._hashes.of(words)
        for table in self._tables:
            if len(words) < table.length:
                continue
            here = ngram_hashes(hashes, table.length)
            at = np.searchsorted(table.hashes, here)
            at[at == len(table.hashes)] = 0
            for place in np.flatnonzero(table.hashes[at] == here):
                run = int(at[place])
                which, start = int(table.text[run]), int(table.place[run])
                theirs = self._words[which][start : start + table.length]
                if theirs == words[place : place + table.length]:
                    return Match(self._problems[which], " ".join(theirs))
        return None


def _table(length: int, found: Sequence[tuple[np.ndarray, int]]) -> _Table:
    hashes = np.concatenate([runs for runs, _ in found])
    text = np.concatenate([np.full(len(runs), which, dtype=np.int64) for runs, which in found])
    place = np.concatenate([np.arange(len(runs), dtype=np.int64) for runs, _ in found])
    unique, first = np.unique(hashes, return_index=True)
    return _Table(length, unique, text[first], place[first])


def evaluation_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, text) pairs of held-out problems (a Parquet file: question, and solution with answer) or
    documents."""
    if path.is_dir():
        for document in iter_documents(path):
            yield document.id, document.text
        return
    try:
        rows = pq.read_table(path, columns=["id", "prompt", "thought", "answer"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise HeadwaterError(f"{path} is not a file of problems: {error}") from error
    for row in rows:
        yield row["id"], row["prompt"]
        yield row["id"], f"{row['thought']} {row['answer']}"
