"""Choosing which files to read under a cap, and how much of those that hold many records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from data.hashing import hash64, unit
from data.sources.base import Candidate, Source
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

    @property
    def name(self) -> str:
        """Name in the manifest, the same on every machine that has the same files."""
        return f"{self.source.name}:{self.candidate.name}"


@dataclass
class Choice:
    """What to read, in order, and what the names of files and folders say not to read."""

    files: list[Chosen] = field(default_factory=list)
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


def choose(sources: Sequence[Source], max_bytes: int, max_document_bytes: int) -> Choice:
    """The files to read, at most about `max_bytes` of text (0 = all), in an order that is an even sample.

    The cap is shared out equally; what one source cannot fill goes to the others. Within a source, files are
    taken in the order of the hash of their name, and of files that hold many records the same share of each.
    """
    choice = Choice()
    listed = [_listed(source, place, sources, choice) for place, source in enumerate(sources)]
    weigh = [
        [0 if c.bytes > max_document_bytes and not c.records else c.bytes for c in few] for few in listed
    ]
    totals = [sum(weights) for weights in weigh]
    allotments = _share_out(totals, max_bytes) if max_bytes else [float(total) for total in totals]
    for source, found, weights, total, allotment in zip(
        sources, listed, weigh, totals, allotments, strict=True
    ):
        share = min(1.0, allotment / total) if total else 1.0
        left = share * sum(weight for one, weight in zip(found, weights, strict=True) if not one.records)
        for one, weight in sorted(
            zip(found, weights, strict=True), key=lambda pair: (hash64("file", pair[0].name), pair[0].name)
        ):
            if one.records:
                choice.files.append(Chosen(source, one, share))
            elif share == 1.0 or (weight <= left if weight else unit("oversized", one.name) < share):
                left -= weight
                choice.files.append(Chosen(source, one, 1.0))
    return choice


def _listed(source: Source, place: int, sources: Sequence[Source], choice: Choice) -> list[Candidate]:
    """What can be read of a source, renamed if an earlier source of the same kind may use the same names.

    What is to be skipped goes into the choice.
    """
    twins = sum(other.name == source.name for other in sources[:place])
    found = []
    for one in source.candidates():
        if not one.skipped:
            found.append(one)
            continue
        choice.skipped[one.skipped] += 1
        if len(choice.skipped_first) < 5:
            choice.skipped_first.append(f"{one.name} ({one.skipped})")
    return [replace(one, name=f"{twins + 1}/{one.name}") for one in found] if twins else found


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
