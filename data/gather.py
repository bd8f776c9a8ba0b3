"""Encode what the mixture asks for, and no more, into a scratch file of pieces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.encode import Problem, ProblemEncoder, TextEncoder
from data.fim import is_fim
from data.heldout import TextList, texts_of
from data.mixture import Draw, draw, nearest, order
from data.packing import Piece
from data.spool import Spool
from infra.errors import HeadwaterError

TEXT = "text"
# More bytes than a token of any usual tokenizer has: how far ahead of the target text is encoded at first.
_BYTES_PER_TOKEN = 6
_BATCH = 1024


class Pieces:
    """Encoded pieces in scratch files, by number."""

    def __init__(self, scratch: Path, name: str) -> None:
        self._ids = Spool(scratch / f"{name}.ids.bin", np.int32)
        self._loss = Spool(scratch / f"{name}.loss.bin", np.uint8)

    def add(self, pieces: Sequence[Piece]) -> range:
        """Store the pieces of a document; returns their numbers."""
        start = len(self._ids)
        for piece in pieces:
            self._ids.append(piece.ids)
            self._loss.append(piece.loss)
        return range(start, len(self._ids))

    def __getitem__(self, number: int) -> Piece:
        return Piece(self._ids[number], self._loss[number])

    def lengths(self) -> np.ndarray:
        """[pieces] int64, tokens."""
        return self._ids.lengths()

    def close(self) -> None:
        self._ids.close()
        self._loss.close()


@dataclass
class Group:
    """What one source gives to the mixture."""

    draw: Draw
    numbers: np.ndarray  # [drawn] int64: numbers of the pieces, repeated as the documents are
    tokens: int
    notes: dict[str, int]  # counts for the statistics


def _group(drawn: Draw, where: dict[int, range], pieces: Pieces, target: int, notes: dict[str, int]) -> Group:
    numbers = [number for document in drawn.documents for number in where[int(document)]]
    lengths = pieces.lengths()[numbers]
    count = nearest(lengths, target)
    return Group(drawn, np.asarray(numbers[:count], dtype=np.int64), int(lengths[:count].sum()), notes)


def gather_text(
    folder: Path,
    listed: TextList,
    target: int,
    seed: int,
    encoder: TextEncoder,
    pieces: Pieces,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Group:
    """Draw training documents of about `target` tokens.

    They are encoded in the order in which the first epoch takes them, some way ahead of the target, and
    further if that was not enough.
    """
    sequence = order(TEXT, len(listed.train), 0, seed)
    reach = np.cumsum(np.asarray(listed.sizes, dtype=np.int64)[sequence])
    tokens = np.zeros(len(sequence), dtype=np.int64)
    where: dict[int, range] = {}
    rewritten = cut = done = 0
    ahead = _BYTES_PER_TOKEN * target
    while done < len(sequence) and tokens.sum() < target:
        end = min(len(sequence), max(done, int(np.searchsorted(reach, ahead))) + 1)
        wanted = {listed.train[i]: int(i) for i in sequence[done:end]}
        for batch in texts_of(folder, wanted):
            for (name, _), encoded in zip(batch, encoder.encode(batch), strict=True):
                document = wanted[name]
                where[document] = pieces.add(encoded)
                tokens[document] = sum(len(piece.ids) for piece in encoded)
                rewritten += int(is_fim(encoded[0].ids))
                cut += len(encoded) > 1
            progress(min(int(tokens.sum()), target), target)
        done, ahead = end, 2 * ahead
    # Documents that were not encoded come after the target in the order of the draw, whatever size they have.
    drawn = draw(TEXT, np.where(tokens > 0, tokens, max(1, target)), target, seed)
    if not tokens[drawn.documents].all():
        raise AssertionError("the mixture drew a document that was not encoded")
    notes = {"encoded": len(where), "rewritten_for_fim": rewritten, "longer_than_a_row": cut}
    return _group(drawn, where, pieces, target, notes)


def read_problems(files: Sequence[Path]) -> dict[str, list[Problem]]:
    """Problems of all files by family, sorted by id, each id once. HeadwaterError for a file of another
    form."""
    columns = ["id", "family", "prompt", "thought", "answer", "system"]
    found: dict[str, dict[str, Problem]] = {}
    for path in files:
        try:
            rows = pq.read_table(path, columns=columns).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise HeadwaterError(
                f"{path} is not a file of problems ({', '.join(columns)}): {error}"
            ) from error
        for row in rows:
            found.setdefault(row["family"], {})[row["id"]] = Problem(**row)
    return {family: [by_id[name] for name in sorted(by_id)] for family, by_id in sorted(found.items())}


def gather_problems(
    family: str,
    problems: Sequence[Problem],
    target: int,
    seed: int,
    capacity: int,
    encoder: ProblemEncoder,
    pieces: Pieces,
) -> Group:
    """Draw problems of one family of about `target` tokens. Those longer than a row are left out and
    counted."""
    where: dict[int, range] = {}
    tokens: list[int] = []
    too_long = 0
    for start in range(0, len(problems), _BATCH):
        for piece in encoder.encode(problems[start : start + _BATCH]):
            if len(piece.ids) > capacity:
                too_long += 1
                continue
            where[len(tokens)] = pieces.add([piece])
            tokens.append(len(piece.ids))
    if too_long == len(problems):
        raise HeadwaterError(
            f"all {too_long} problems of {family!r} are longer than sequence_length = {capacity}: make "
            "them smaller in the tasks stage, raise sequence_length, or take them out of the mixture"
        )
    drawn = draw(family, np.asarray(tokens, dtype=np.int64), target, seed)
    return _group(drawn, where, pieces, target, {"too_long": too_long})
