"""Reading the chosen files, every document accounted for."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from data.choose import SKIPPED_ROW, Choice, Chosen, digest
from data.documents import Document, DocumentWriter
from data.sources.base import Reading, Rejection
from data.sources.records import OVER_CAP
from infra.errors import HeadwaterError


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
    skipped: Counter[str] = field(default_factory=Counter)  # files and folders not read, by reason
    skipped_first: list[str] = field(default_factory=list)

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
            "skipped_by_name": self.skipped.total(),
            "bytes": self.kept_bytes,
            "dropped_by_reason": dict(self.dropped),
            "quarantined_by_reason": dict(self.quarantined),
            "skipped_by_reason": dict(self.skipped),
            "documents_by_source": dict(self.by_source),
            "bytes_by_source": dict(self.bytes_by_source),
        }


def ingest(
    choice: Choice,
    reading: Reading,
    max_bytes: int,
    writer: DocumentWriter,
    digests: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Account:
    """Read what was chosen into the writer.

    `digests` is the manifest of the scan, by name: a file that changed since then raises HeadwaterError, as
    the result would not be what its fingerprint says.
    """
    account = Account(skipped=choice.skipped, skipped_first=choice.skipped_first)
    if digests is not None and digests.get(SKIPPED_ROW, "") != choice.skipped_digest():
        raise HeadwaterError("files came or went in sources while they were being read; run the stage again")
    for place, one in enumerate(choice.files):
        if digests is not None and digests.get(one.name) != digest(one)[1]:
            raise HeadwaterError(f"{one.candidate.file} changed while it was being read; run the stage again")
        for found in one.source.read(one.candidate, replace(reading, share=one.share)):
            account.read += 1
            _settle(account, one, found, max_bytes, writer)
        progress(place + 1, len(choice.files))
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
        skipped = account.skipped.total()
        passed = f" {skipped} files or folders were skipped by name, first: " if skipped else ""
        passed += ", ".join(account.skipped_first)
        passed += ": give text a suffix such as .txt, or name a file itself in sources." if skipped else ""
        raise HeadwaterError(
            f"no documents: the sources hold nothing that can be used ({account.read} met"
            f"{': ' + reasons if reasons else ''}).{passed} Check sources and text_field"
        )
