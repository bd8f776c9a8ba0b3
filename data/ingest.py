"""Reading the chosen files, every document accounted for."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from data.choose import SKIPPED_ROW, Choice, Chosen, digest
from data.documents import Document, DocumentWriter
from data.sources.base import Reading, Rejection
from data.sources.records import OVER_CAP
from data.sources.survey import Survey, survey
from infra.errors import HeadwaterError


@dataclass
class Account:
    """Every document met, by what became of it."""

    read: int = 0
    untried: int = 0  # of these, passed over unread: records beyond the share that the cap leaves
    left_out: int = 0  # not of these: files of one document that the cap leaves out
    faults_of_all: int = 0  # quarantined, found by looking at all documents instead of those tried
    kept: int = 0
    kept_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    bytes_by_source: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str, str, str, str]] = field(default_factory=list)  # (id, source, path, reason)
    quarantined_first: list[str] = field(default_factory=list)
    plain_bytes: float = 0  # in files of one document
    surveys: list[tuple[float, str, Survey]] = field(default_factory=list)  # (share, path, what a file holds)
    skipped: Counter[str] = field(default_factory=Counter)  # files and folders not read, by reason
    skipped_first: list[str] = field(default_factory=list)

    def check(self, after: str) -> None:
        """read = kept + dropped + quarantined, or a bug lost a document.

        `read` grows by what a file says that it holds, where it says so, and the others by what comes out.
        """
        if self.read != self.kept + self.dropped.total() + self.quarantined.total():
            raise AssertionError(
                f"{self.read} documents read up to {after}, but {self.kept} kept, {self.dropped.total()} "
                f"dropped and {self.quarantined.total()} quarantined"
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
    account = Account(left_out=choice.left_out, skipped=choice.skipped, skipped_first=choice.skipped_first)
    if digests is not None and digests.get(SKIPPED_ROW, "") != choice.skipped_digest():
        raise HeadwaterError("files came or went in sources while they were being read; run the stage again")
    for place, one in enumerate(choice.files):
        if digests is not None and digests.get(one.name) != digest(one)[1]:
            raise HeadwaterError(f"{one.candidate.file} changed while it was being read; run the stage again")
        surveyed = one.surveyed or (survey(one.candidate, reading) if one.candidate.records else None)
        if surveyed:
            account.surveys.append((one.share, one.candidate.name, surveyed))
        elif one.candidate.bytes <= reading.max_document_bytes:
            account.plain_bytes += one.candidate.bytes
        met = 0
        for found in one.source.read(one.candidate, replace(reading, share=one.share)):
            met += found.count if isinstance(found, Rejection) else 1
            _settle(account, one, found, max_bytes, writer)
        account.read += surveyed.records if surveyed and surveyed.records is not None else met
        account.check(one.candidate.name)
        progress(place + 1, len(choice.files))
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
    tally[reason_class(found.reason)] += found.count
    if found.reason == OVER_CAP:
        account.untried += found.count
    else:
        account.faults_of_all += found.count * (found.quarantined and (found.of_all or one.seen_whole))
        account.rejected.append(("", one.source.name, found.path, found.reason))
    if found.quarantined and len(account.quarantined_first) < 5:
        account.quarantined_first.append(f"{found.path} ({found.reason})")


def reason_class(reason: str) -> str:
    """A reason without its particulars, for counting."""
    return re.split(r":| at | \(", reason, maxsplit=1)[0]


def share_unreadable(account: Account) -> float:
    """The share of all documents that cannot be read.

    Under a small cap most documents are passed over, and those that are tried stand for the rest. Faults that
    show without trying (a line or file that is too large) are compared with all documents instead.
    """
    everything = account.read + account.left_out
    if not everything:
        return 0.0
    seen = account.faults_of_all
    tried = account.read - account.untried - seen
    bad = (account.quarantined.total() - seen) / tried if tried else 0.0
    return (bad * (everything - seen) + seen) / everything


def share_torn(account: Account) -> tuple[float, list[str]]:
    """The share of the bytes that are beyond a tear, where no one can count documents; and in which files.

    A file that lacks its end may have been of any size: it is taken to have been as large as the largest
    file of records here, and at least twice what is left of it.
    """
    largest = max((one.bytes + one.lost for _, _, one in account.surveys), default=0)
    lost, total, torn = 0.0, account.plain_bytes, []
    for share, path, one in account.surveys:
        missing = max(one.lost, one.bytes, largest - one.bytes) if one.cut else one.lost
        lost += share * missing
        total += share * (one.bytes + missing)
        if missing:
            torn.append(path)
    return (lost / total if total else 0.0), torn


def check_budget(account: Account, error_budget: float) -> None:
    """Raise HeadwaterError if nothing was kept, or a larger share than `error_budget` was quarantined or is
    beyond a tear.
    """
    bad, tried = account.quarantined.total(), account.read - account.untried
    first = "; ".join(account.quarantined_first)
    what = (
        f"error_budget is {error_budget:.1%}). First: {first}. Repair or remove them, or raise error_budget"
    )
    if (share := share_unreadable(account)) > error_budget:
        estimate = " of all" if account.untried or account.left_out else ""
        raise HeadwaterError(f"{bad} of {tried} documents could not be read ({share:.1%}{estimate}, {what}")
    share, torn = share_torn(account)
    if share > error_budget:
        raise HeadwaterError(
            f"{len(torn)} files are damaged or cut off; about {share:.1%} of all bytes cannot be reached "
            f"(error_budget is {error_budget:.1%}). First: {', '.join(torn[:5])}. Repair or remove them, or "
            "raise error_budget"
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
