"""Choosing which files to read under a cap, and how much of those that hold many records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from data.hashing import hash64, unit
from data.sources.base import Candidate, Reading, Source
from data.sources.survey import Survey, survey, unpacked_bytes
from infra.config import canonical_json
from infra.files import sha256_bytes, sha256_file

UNREADABLE_DIGEST = "unreadable"
SKIPPED_ROW = "skipped by name"


@dataclass(frozen=True)
class Chosen:
    """A file to read, and the share of its records to take."""

    source: Source
    candidate: Candidate
    share: float
    surveyed: Survey | None = None
    seen_whole: bool = False  # not taken as a sample: its fault shows before it is read

    @property
    def name(self) -> str:
        """Name in the manifest, the same on every machine that has the same files.

        The share of the records is part of it: it depends on the size of files that are not chosen, too.
        """
        share = f" (share {self.share!r})" if self.share < 1 else ""
        return f"{self.source.name}:{self.candidate.name}{share}"


@dataclass
class Choice:
    """What to read, in order, and what the names of files and folders say not to read."""

    files: list[Chosen] = field(default_factory=list)
    left_out: int = 0  # files of one document beyond the cap
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    skipped_first: list[str] = field(default_factory=list)

    def manifest(self) -> list[tuple[str, int, str]]:
        """(name, size, SHA-256) of everything that the result depends on.

        The counts of what was skipped are part of it, as they are part of the result; the names are not.
        """
        rows = [(one.name, *digest(one)) for one in self.files]
        if self.skipped:
            rows.append((SKIPPED_ROW, 0, self.skipped_digest()))
        return rows

    def skipped_digest(self) -> str:
        """SHA-256 of how much was skipped for which reason, "" if nothing was."""
        return sha256_bytes(canonical_json(dict(self.skipped))) if self.skipped else ""


def choose(sources: Sequence[Source], max_bytes: int, reading: Reading) -> Choice:
    """The files to read, at most about `max_bytes` of text (0 = all), in an order that is an even sample.

    Sources are taken in the order of their names, so that the manifest alone decides the result. The cap is
    shared out equally; what one source cannot fill goes to the others. Within a source, files are taken in
    the order of the hash of their name, and of files that hold many records the same share of each. What is
    seen to be unreadable or too large weighs nothing and is always there, to be counted.
    """
    choice = Choice()
    found = [(source, source.candidates()) for source in sources]
    found.sort(key=lambda pair: (pair[0].name, sorted(one.name for one in pair[1])))
    listed = [
        [_weighed(one, max_bytes, reading) for one in _to_read(place, found, choice)]
        for place in range(len(found))
    ]
    totals = [sum(one.weight for one in few) for few in listed]
    allotments = _share_out(totals, max_bytes) if max_bytes else [float(total) for total in totals]
    for (source, _), few, total, allotment in zip(found, listed, totals, allotments, strict=True):
        share = min(1.0, allotment / total) if total else 1.0
        left = share * sum(one.weight for one in few if not one.file.records)
        for one in sorted(few, key=lambda one: (hash64("file", one.file.name), one.file.name)):
            if one.file.records:
                choice.files.append(Chosen(source, one.file, share, one.surveyed))
            elif one.file.problem or one.file.bytes > reading.max_document_bytes:
                choice.files.append(Chosen(source, one.file, 1.0, seen_whole=True))
            elif share == 1.0 or (
                one.weight <= left if one.weight else unit("oversized", one.file.name) < share
            ):
                left -= one.weight
                choice.files.append(Chosen(source, one.file, 1.0))
            else:
                choice.left_out += 1
    return choice


def _to_read(place: int, found: list[tuple[Source, list[Candidate]]], choice: Choice) -> list[Candidate]:
    """What can be read of a source, renamed if an earlier source of the same kind may use the same names.

    What is to be skipped goes into the choice.
    """
    source, candidates = found[place]
    twins = sum(other.name == source.name for other, _ in found[:place])
    kept = []
    for one in candidates:
        if not one.skipped:
            kept.append(one)
            continue
        choice.skipped[one.skipped] += 1
        if len(choice.skipped_first) < 5:
            choice.skipped_first.append(f"{one.name} ({one.skipped})")
    return [replace(one, name=f"{twins + 1}/{one.name}") for one in kept] if twins else kept


@dataclass(frozen=True)
class _Weighed:
    file: Candidate
    weight: int  # bytes of text that it can give, unpacked
    surveyed: Survey | None = None


def _weighed(file: Candidate, max_bytes: int, reading: Reading) -> _Weighed:
    limit = reading.max_document_bytes
    if file.records and max_bytes:  # without a cap nothing has to be weighed before it is read
        surveyed = survey(file, reading)
        return _Weighed(file, surveyed.bytes, surveyed)
    size = file.bytes
    if file.file.suffix == ".zst" and not file.records and not file.problem and max_bytes:
        size = unpacked_bytes(file, limit)
    return _Weighed(file, size if file.records or size <= limit else 0)


def _share_out(totals: Sequence[int], cap: int) -> list[float]:
    allotments = [0.0] * len(totals)
    left = float(cap)
    order = sorted(range(len(totals)), key=lambda place: (totals[place], place))
    for rank, place in enumerate(order):
        allotments[place] = min(float(totals[place]), left / (len(order) - rank))
        left -= allotments[place]
    return allotments


def digest(one: Chosen) -> tuple[int, str]:
    """Size and SHA-256 of a chosen file, in constant memory; (0, "unreadable") if it cannot be read."""
    if one.candidate.problem:
        return 0, UNREADABLE_DIGEST
    try:
        return one.candidate.file.stat().st_size, sha256_file(one.candidate.file)
    except OSError:
        return 0, UNREADABLE_DIGEST
