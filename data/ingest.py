"""Choosing what to read under a cap, and reading it with every file accounted for."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from data.documents import Document, DocumentWriter
from data.hashing import hash64, unit
from data.sources.base import Candidate, Reading, Rejection, Source
from data.sources.records import OVER_CAP
from infra.errors import HeadwaterError
from infra.files import sha256_file

UNREADABLE_DIGEST = "unreadable"


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


def choose(sources: Sequence[Source], max_bytes: int, max_document_bytes: int) -> list[Chosen]:
    """The files to read, at most about `max_bytes` of text (0 = all), in an order that is an even sample.

    The cap is shared out equally; what one source cannot fill goes to the others. Within a source, files are
    taken in the order of the hash of their name, and of files that hold many records the same share of each.
    """
    listed = [_distinct(source, place, sources) for place, source in enumerate(sources)]
    weigh = [
        [0 if c.bytes > max_document_bytes and not c.records else c.bytes for c in few] for few in listed
    ]
    totals = [sum(weights) for weights in weigh]
    allotments = _share_out(totals, max_bytes) if max_bytes else [float(total) for total in totals]
    chosen: list[Chosen] = []
    for source, found, weights, total, allotment in zip(
        sources, listed, weigh, totals, allotments, strict=True
    ):
        share = min(1.0, allotment / total) if total else 1.0
        left = share * sum(weight for one, weight in zip(found, weights, strict=True) if not one.records)
        for one, weight in sorted(
            zip(found, weights, strict=True), key=lambda pair: (hash64("file", pair[0].name), pair[0].name)
        ):
            if one.records:
                chosen.append(Chosen(source, one, share))
            elif share == 1.0 or (weight <= left if weight else unit("oversized", one.name) < share):
                left -= weight
                chosen.append(Chosen(source, one, 1.0))
    return chosen


def _distinct(source: Source, place: int, sources: Sequence[Source]) -> list[Candidate]:
    """The candidates of a source, renamed if an earlier source of the same kind may use the same names."""
    twins = sum(other.name == source.name for other in sources[:place])
    found = source.candidates()
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


@dataclass
class Account:
    """Every document met, by what became of it."""

    read: int = 0
    untried: int = 0  # of these, passed over unread: records beyond the share that the cap leaves
    kept: int = 0
    kept_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    bytes_by_source: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str, str, str, str]] = field(default_factory=list)  # (id, source, path, reason)
    quarantined_first: list[str] = field(default_factory=list)

    def check(self) -> None:
        """read = kept + dropped + quarantined, or a bug lost a document."""
        if self.read != self.kept + self.dropped.total() + self.quarantined.total():
            raise AssertionError(
                f"{self.read} documents read, but {self.kept} kept, {self.dropped.total()} dropped and "
                f"{self.quarantined.total()} quarantined"
            )

    def summary(self) -> dict[str, object]:
        """For stats.json."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": self.dropped.total(),
            "quarantined": self.quarantined.total(),
            "bytes": self.kept_bytes,
            "dropped_by_reason": dict(self.dropped),
            "quarantined_by_reason": dict(self.quarantined),
            "documents_by_source": dict(self.by_source),
            "bytes_by_source": dict(self.bytes_by_source),
        }


def ingest(
    chosen: Sequence[Chosen],
    reading: Reading,
    max_bytes: int,
    writer: DocumentWriter,
    digests: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Account:
    """Read the chosen files into the writer.

    `digests` is the manifest of the scan, by name: a file that changed since then raises HeadwaterError, as
    the result would not be what its fingerprint says.
    """
    account = Account()
    for place, one in enumerate(chosen):
        if digests is not None and digests.get(one.name) != digest(one)[1]:
            raise HeadwaterError(f"{one.candidate.file} changed while it was being read; run the stage again")
        for found in one.source.read(one.candidate, replace(reading, share=one.share)):
            account.read += 1
            _settle(account, one, found, max_bytes, writer)
        progress(place + 1, len(chosen))
    account.check()
    return account


def _settle(
    account: Account, one: Chosen, found: Document | Rejection, max_bytes: int, writer: DocumentWriter
) -> None:
    if isinstance(found, Document):
        size = len(found.text.encode("utf-8"))
        if max_bytes and account.kept_bytes + size > max_bytes:
            account.dropped[OVER_CAP] += 1
            return
        writer.add(found)
        account.kept += 1
        account.kept_bytes += size
        account.by_source[found.source] += 1
        account.bytes_by_source[found.source] += size
        return
    tally = account.quarantined if found.quarantined else account.dropped
    tally[reason_class(found.reason)] += 1
    if found.reason == OVER_CAP:
        account.untried += 1
    else:
        account.rejected.append(("", one.source.name, found.path, found.reason))
    if found.quarantined and len(account.quarantined_first) < 5:
        account.quarantined_first.append(f"{found.path} ({found.reason})")


def reason_class(reason: str) -> str:
    """A reason without its particulars, for counting."""
    return re.split(r":| at | \(", reason, maxsplit=1)[0]


def check_budget(account: Account, error_budget: float) -> None:
    """Raise HeadwaterError if nothing was kept, or a larger share than `error_budget` was quarantined.

    The share is of the documents that were tried: under a small cap most records of a file are passed over,
    and they say nothing about the rest.
    """
    bad, tried = account.quarantined.total(), account.read - account.untried
    first = "; ".join(account.quarantined_first)
    if bad > error_budget * tried:
        raise HeadwaterError(
            f"{bad} of {tried} documents could not be read ({bad / tried:.1%}, error_budget is "
            f"{error_budget:.1%}). First: {first}. Repair or remove them, or raise error_budget"
        )
    if not account.kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in account.dropped.most_common())
        raise HeadwaterError(
            f"no documents: the sources hold nothing that can be used ({account.read} met"
            f"{': ' + reasons if reasons else ''}). Check sources and text_field"
        )
