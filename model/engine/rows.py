"""Which requests run, and which of their tokens are read next.

A row is a list of tokens and a count of those that the cache holds. Every step reads tokens that it does not
hold yet: a stretch of a prompt, or the last token and its drafts. So prompts are read in pieces between the
steps of others, and a row that must give its pages back is simply one of which nothing is held.
"""

from __future__ import annotations

from collections import deque
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
    made: int = 0
    cached: int = 0
    shared: int = 0
    """Positions below this one lie in pages that others may use, and are not written."""
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Keys of the full pages that are known."""
    drafts: list[int] = field(default_factory=list)
    line: int = -1
    """Its line in the page table."""
    private: bool = False
    """It holds latents of weights that have been replaced, which serve nobody else."""


@dataclass(frozen=True)
class Span:
    """New tokens of a row: `count` of its own from position `start`, and then its drafts when `ends`, that is
    when they are the last that it has."""

    row: Row
    start: int
    count: int
    ends: bool

    @property
    def width(self) -> int:
        return self.count + (len(self.row.drafts) if self.ends else 0)


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
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._by_prompt: dict[tuple[int, ...], Row] = {}
        self.preemptions = self.reused = 0

    def admit(self) -> None:
        """Start waiting rows, first come first served, while there is room.

        A row whose prompt another is reading waits for it: it will find the pages. The samples of a group
        share one reading in this way.
        """
        held: list[Row] = []
        while self.waiting and len(self.running) < self.max_rows and len(held) < 4 * self.max_rows:
            row = self.waiting.popleft()
            leader = self._by_prompt.get(row.request.prompt)
            if leader is not None and leader.cached < len(row.request.prompt) and not row.made:
                held.append(row)
                continue
            try:
                self._start(row)
            except OutOfPages:
                self._drop(row)
                held.append(row)
                break
        self.waiting.extendleft(reversed(held))

    def _start(self, row: Row) -> None:
        """Give a row the known pages of its beginning and room for the rest of what it has."""
        row.line = self.lines.pop()
        self.running.append(row)
        key, tokens = b"", row.tokens
        for at in range(0, len(tokens) - PAGE + 1, PAGE):
            key = chain(key, tokens[at : at + PAGE])
            page = self.pages.find(key)
            if page is None:
                break
            self._append(row, self.pages.share(page))
            row.keys.append(key)
        known = row.shared = len(row.pages) * PAGE
        leader = self._by_prompt.get(row.request.prompt)
        if leader is not None and not row.made and known == len(tokens) // PAGE * PAGE < len(tokens):
            # The page that the prompt ends in goes on differently in each answer.
            last = row.pages[-1] if row.pages else SCRATCH
            self._append(row, self.pages.copy(leader.pages[len(row.pages)], len(tokens) - known, last))
            known = len(tokens)
        # The last token is always read, for what follows it; with drafts one more, for its state.
        row.cached = max(0, min(known - (self.drafts > 0), len(tokens) - 1))
        self.reused += row.cached
        self._reserve(row, min(len(tokens), row.cached + self.chunk))
        if leader is None:
            self._by_prompt[row.request.prompt] = row

    def _append(self, row: Row, page: int) -> None:
        self.table[row.line, len(row.pages)] = page
        row.pages.append(page)

    def _reserve(self, row: Row, tokens: int) -> None:
        need = pages_for(tokens, self.drafts)
        while len(row.pages) < need:
            self._append(row, self.pages.take(row.pages[-1] if row.pages else SCRATCH))

    def _drop(self, row: Row) -> None:
        """Take a row out of the batch and its pages from it."""
        self.running.remove(row)
        self.pages.release(row.pages)
        self.table[row.line] = SCRATCH
        self.lines.append(row.line)
        row.pages, row.keys, row.drafts = [], [], []
        row.cached, row.shared, row.line, row.private = 0, 0, -1, False
        if self._by_prompt.get(row.request.prompt) is row:
            del self._by_prompt[row.request.prompt]

    def finish(self, row: Row) -> None:
        """The row is done, or nobody wants it any more."""
        if row.line < 0:
            self.waiting.remove(row)
        else:
            self._drop(row)

    def spans(self) -> list[Span]:
        """What the next step reads. When pages run out the youngest rows give theirs back and wait again."""
        spans: list[Span] = []
        budget = self.chunk
        for row in list(self.running):
            if row.line < 0:
                continue  # gave way to one before it
            left = len(row.tokens) - row.cached
            count = left if left == 1 else min(left, budget)
            if not count:
                continue
            if self._fits(row, row.cached + count):
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
                self.waiting.appendleft(youngest)
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
        self._by_prompt.clear()
        for row in self.running:
            row.private = True
