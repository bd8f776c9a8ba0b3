"""Which requests run, and which of their tokens are read next.

A row is a list of tokens and a count of those that the cache holds. Every step reads tokens that it does not
hold yet: a stretch of a prompt, or the last token and its drafts. So prompts are read in pieces between the
steps of others, and a row that must give its pages back is simply one of which nothing is held.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from model.engine.pages import PAGE, SCRATCH, OutOfPages, Pages, chain
from model.engine.request import Request
from model.engine.stopping import StopStrings


@dataclass(eq=False)
class Row:
    """One request on its way."""

    ticket: int
    request: Request
    tokens: list[int]
    stop: StopStrings | None
    prompt: bytes
    """Key of the whole prompt."""
    made: int = 0
    cached: int = 0
    shared: int = 0
    """Positions below this one lie in pages that others may use, and are not written."""
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Keys of the full pages that are known."""
    drafts: list[int] = field(default_factory=list)
    line: int = -1
    """Its line in the page table; -1 when it is not running."""
    parked: bool = False
    """It has waited for another to read its prompt."""
    private: bool = False
    """It holds latents of weights that have been replaced, which serve nobody else."""

    @property
    def reading(self) -> bool:
        """Whether its prompt is still being read."""
        return self.cached < len(self.request.prompt)


@dataclass(frozen=True)
class Span:
    """New tokens of a row: `count` of its own from position `start`, and then its drafts when `ends`, that is
    when they are the last that it has."""

    row: Row
    start: int
    count: int
    ends: bool


def pages_for(tokens: int, drafts: int) -> int:
    """Pages of a row that has come to hold `tokens`, with what drafting writes ahead."""
    return -(-(tokens + 1 + 2 * drafts) // PAGE)


class Rows:
    """Waiting and running rows, and their pages. `chunk` bounds the prompt tokens of a step."""

    def __init__(self, pages: Pages, max_rows: int, chunk: int, context: int, drafts: int) -> None:
        self.pages, self.max_rows, self.chunk, self.drafts = pages, max_rows, chunk, drafts
        # Drafts and padding may reach past what a row holds.
        self.table = np.zeros((max_rows, pages_for(context, drafts) + 1), dtype=np.int64)
        self.lines = list(range(max_rows))[::-1]
        self.waiting: OrderedDict[int, Row] = OrderedDict()
        self.running: list[Row] = []
        # The row that reads a prompt first, and those that wait for it.
        self._leaders: dict[bytes, Row] = {}
        self._parked: dict[bytes, dict[int, Row]] = {}
        self.preemptions = self.reused = 0

    @property
    def idle(self) -> int:
        """Rows that are not running."""
        return len(self.waiting) + sum(map(len, self._parked.values()))

    def add(self, row: Row) -> None:
        """Queue a row."""
        self.waiting[row.ticket] = row

    def _first(self, row: Row) -> None:
        self.waiting[row.ticket] = row
        self.waiting.move_to_end(row.ticket, last=False)

    def admit(self) -> None:
        """Start waiting rows, first come first served, while there is room.

        A row whose prompt another is reading is parked until it has been read, and then finds its pages. The
        samples of a group share one reading in this way.
        """
        for key in [key for key in self._parked if not self._reads(key)]:
            for row in reversed(self._parked.pop(key).values()):
                self._first(row)
        while self.waiting and len(self.running) < self.max_rows:
            row = next(iter(self.waiting.values()))
            if self._reads(row.prompt) and not row.made:
                del self.waiting[row.ticket]
                row.parked = True
                self._parked.setdefault(row.prompt, {})[row.ticket] = row
            elif self._start(row):
                del self.waiting[row.ticket]
            else:
                return

    def _reads(self, prompt: bytes) -> bool:
        leader = self._leaders.get(prompt)
        return leader is not None and leader.reading

    def _start(self, row: Row) -> bool:
        """Give a row the known pages of its beginning and room to begin; False when there is not enough."""
        tokens = row.tokens
        keys, found = self._find(tokens)
        known = len(found) * PAGE
        leader = self._leaders.get(row.prompt)
        # The page that a prompt ends in goes on differently in each answer.
        copied = leader is not None and not row.made and known == len(tokens) // PAGE * PAGE < len(tokens)
        held = len(tokens) if copied else known
        # The last token is always read, for what follows it; with drafts one more, for its state.
        cached = max(0, min(held - (self.drafts > 0), len(tokens) - 1))
        need = pages_for(min(len(tokens), cached + self.chunk), self.drafts) - len(found)
        left = self.pages.available - sum(map(self.pages.is_idle, found)) - need
        # A page to spare for every row, or they would soon take each other's.
        if left < len(self.running):
            return False
        row.line = self.lines.pop()
        self.running.append(row)
        for page in found:
            self._append(row, self.pages.share(page))
        row.keys, row.shared, row.cached = keys, known, cached
        if copied and leader is not None:
            last = row.pages[-1] if row.pages else SCRATCH
            self._append(row, self.pages.copy(leader.pages[len(found)], len(tokens) - known, last))
        self._reserve(row, min(len(tokens), cached + self.chunk))
        self.reused += cached
        if leader is None and not row.parked:
            self._leaders[row.prompt] = row
        return True

    def _find(self, tokens: list[int]) -> tuple[list[bytes], list[int]]:
        """Keys and pages of the known pages that the tokens begin with."""
        keys: list[bytes] = []
        found: list[int] = []
        for at in range(0, len(tokens) - PAGE + 1, PAGE):
            key = chain(keys[-1] if keys else b"", tokens[at : at + PAGE])
            page = self.pages.find(key)
            if page is None:
                break
            keys.append(key)
            found.append(page)
        return keys, found

    def _append(self, row: Row, page: int) -> None:
        self.table[row.line, len(row.pages)] = page
        row.pages.append(page)

    def _reserve(self, row: Row, tokens: int) -> None:
        need = pages_for(tokens, self.drafts)
        while len(row.pages) < need:
            self._append(row, self.pages.take(row.pages[-1] if row.pages else SCRATCH))

    def _drop(self, row: Row) -> None:
        """Take a row out of the batch and its pages from it."""
        if row.reading and self._leaders.get(row.prompt) is row:
            self._let_lead(row.prompt)
        self.running.remove(row)
        self.pages.release(row.pages)
        self.table[row.line] = SCRATCH
        self.lines.append(row.line)
        row.pages, row.keys, row.drafts = [], [], []
        row.cached, row.shared, row.line, row.private = 0, 0, -1, False
        if self._leaders.get(row.prompt) is row:
            del self._leaders[row.prompt]

    def _let_lead(self, prompt: bytes) -> None:
        """The prompt has not been read after all: one of those that wait for it must read it for the rest."""
        for row in self._parked.get(prompt, {}).values():
            row.parked = False

    def finish(self, row: Row) -> None:
        """The row is done, or nobody wants it any more."""
        if row.line >= 0:
            self._drop(row)
        elif row.ticket in self.waiting:
            del self.waiting[row.ticket]
        else:
            self._parked[row.prompt].pop(row.ticket)

    def spans(self) -> list[Span]:
        """What the next step reads. When pages run out the youngest rows give theirs back and wait again."""
        spans: list[Span] = []
        budget = self.chunk
        for row in list(self.running):
            if row.line < 0:
                continue  # gave way to one before it
            left = len(row.tokens) - row.cached
            count = left if left == 1 else min(left, budget)
            if count and self._fits(row, row.cached + count):
                budget -= count if left > 1 else 0
                spans.append(Span(row, row.cached, count, count == left))
        return spans

    def _fits(self, row: Row, tokens: int) -> bool:
        """Reserve room for a row, at the cost of younger ones; False when it had to give way itself."""
        while True:
            try:
                self._reserve(row, tokens)
                return True
            except OutOfPages:
                youngest = self.running[-1]
                self._drop(youngest)
                self._first(youngest)
                self.preemptions += 1
                if youngest is row:
                    return False

    def publish(self, row: Row, count: int) -> None:
        """Make the full pages among a row's first `count` positions known."""
        if row.private:
            return
        for number in range(len(row.keys), count // PAGE):
            tokens = row.tokens[number * PAGE : (number + 1) * PAGE]
            row.keys.append(chain(row.keys[-1] if row.keys else b"", tokens))
            self.pages.publish(row.pages[number], row.keys[-1])

    def forget(self) -> None:
        """Nothing cached serves new rows: the weights have changed. Running rows go on with what they have,
        and their pages stay theirs alone."""
        self.pages.forget()
        self._leaders.clear()
        for prompt in self._parked:
            self._let_lead(prompt)
        for row in self.running:
            row.private = True
