"""Filters in a row: a document is kept if none of them gives a reason against it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from data.documents import Document
from data.filters.features import Features, WordTable


class Filter(Protocol):
    """One rule or family of rules."""

    name: str

    def check(self, document: Features) -> str | None:
        """Why the document should go, as a short word, or None."""
        ...


@dataclass
class Chain:
    """The filters for each kind of document ("text", "code"), and what they did."""

    filters: Mapping[str, Sequence[Filter]]
    seen: Counter[str] = field(default_factory=Counter)  # documents that reached a filter
    dropped: Counter[str] = field(default_factory=Counter)  # "filter.reason"
    _table: WordTable = field(default_factory=WordTable)

    def check(self, document: Document) -> str | None:
        """The reason for the drop as "filter.reason", from the first filter that has one; None to keep."""
        features = Features(document.text, self._table)
        for one in self.filters[document.kind]:
            self.seen[one.name] += 1
            if reason := one.check(features):
                reason = f"{one.name}.{reason}"
                self.dropped[reason] += 1
                return reason
        return None

    def worst(self) -> str:
        """The filter that dropped most and how many, for an error message."""
        by_filter: Counter[str] = Counter()
        for reason, count in self.dropped.items():
            by_filter[reason.partition(".")[0]] += count
        if not by_filter:
            return "no filter dropped anything"
        name = min(by_filter, key=lambda one: (-by_filter[one], one))
        reasons = {r: c for r, c in self.dropped.items() if r.startswith(f"{name}.")}
        most = min(reasons, key=lambda one: (-reasons[one], one))
        return f"{name!r} dropped {by_filter[name]} of them, {reasons[most]} as {most.partition('.')[2]!r}"
