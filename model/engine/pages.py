"""The latent cache: pages of a fixed number of tokens, shared between requests that begin alike.

Multi-head latent attention caches one latent a token and layer (576 values at the V3 shape), and what it
holds at a position depends on the tokens up to there and on nothing else. So a full page is known by the
chain of tokens that led to it: a request whose prompt begins with the same tokens uses the page instead of
reading them again, while the first request runs and after it has finished, until the page is needed.
Legend: W latent width.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch

PAGE = 16
"""Tokens of a page."""
SCRATCH = 0
"""The page that is written where nothing is to be kept, such as padding. Nobody owns it, or reads it."""


class OutOfPages(Exception):
    """The cache is full and every page is in use."""


class Pages:
    """`limit` bounds the number of pages; storage grows towards it as pages are needed."""

    def __init__(
        self, layers: int, width: int, dtype: torch.dtype, device: torch.device | str, limit: int
    ) -> None:
        self.limit = limit
        self.latents = [torch.zeros(PAGE, width, dtype=dtype, device=device) for _ in range(layers)]
        """One tensor [pages * PAGE, W] a layer; slot p * PAGE + i is place i of page p."""
        self._users = [1]
        self._free: set[int] = set()
        # Free pages from the lowest up. A page that was taken by its number stays in it until its turn.
        self._order: list[int] = []
        self._ordered: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages that nobody uses, oldest first
        self._known: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self._written: set[int] = set()
        self._dirty: list[int] = []

    @property
    def used(self) -> int:
        """Pages that some request holds."""
        return len(self._users) - 1 - len(self._free) - len(self._idle)

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return self.limit - self.used

    def is_idle(self, page: int) -> bool:
        """Whether a known page is used by nobody."""
        return page in self._idle

    def take(self, after: int = SCRATCH) -> int:
        """A page for one user; `after`'s neighbour when that is free, so that long contexts lie in one piece.

        Raises OutOfPages when every page is in use.
        """
        if not self._free and len(self._users) <= self.limit:
            self._grow()
        if after != SCRATCH and after + 1 in self._free:
            page = after + 1
            self._free.remove(page)
        elif self._free:
            page = self._lowest()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._key.pop(page)]
        else:
            raise OutOfPages
        self._users[page] = 1
        if page in self._written:
            self._dirty.append(page)
        self._written.add(page)
        return page

    def _lowest(self) -> int:
        while True:
            page = heapq.heappop(self._order)
            self._ordered.remove(page)
            if page in self._free:
                self._free.remove(page)
                return page

    def _put_back(self, page: int) -> None:
        self._free.add(page)
        if page not in self._ordered:
            self._ordered.add(page)
            heapq.heappush(self._order, page)

    def _grow(self) -> None:
        have = len(self._users)
        # Doubled, so that copying is rare; one layer after the other, so that no two whole caches exist.
        more = min(max(have, 64), self.limit + 1 - have)
        for layer, latents in enumerate(self.latents):
            self.latents[layer] = torch.cat((latents, latents.new_zeros(more * PAGE, latents.shape[1])))
        self._users += [0] * more
        for page in range(have, have + more):
            self._put_back(page)

    def clean(self) -> None:
        """Clear what former users left in the pages that were taken. Where a row has not written yet it reads
        with weight zero, and zero times a NaN that somebody left would be a NaN."""
        if not self._dirty:
            return
        index = torch.tensor(self._dirty, device=self.latents[0].device)
        for latents in self.latents:
            latents.view(-1, PAGE, latents.shape[1]).index_fill_(0, index, 0)
        self._dirty.clear()

    def share(self, page: int) -> int:
        """One more user of a page."""
        self._users[page] += 1
        self._idle.pop(page, None)
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One user fewer of each. A page that is known stays readable until it is needed, the end of a chain
        before its beginning, without which it is of no use."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key:
                self._idle[page] = None
            else:
                self._put_back(page)

    def copy(self, page: int, count: int, after: int = SCRATCH) -> int:
        """A page of its own with the first `count` tokens of another, which two answers go on from."""
        new = self.take(after)
        self.clean()
        for latents in self.latents:
            latents[new * PAGE : new * PAGE + count] = latents[page * PAGE : page * PAGE + count]
        return new

    def publish(self, page: int, key: bytes) -> None:
        """Make a full page known by the chain of tokens that it ends. The first page of a chain stays."""
        if key not in self._known and page not in self._key:
            self._known[key], self._key[page] = page, key

    def find(self, key: bytes) -> int | None:
        """The page known by a key."""
        return self._known.get(key)

    def forget(self) -> None:
        """Nothing that was cached serves new requests: the weights have changed."""
        for page in self._idle:
            self._put_back(page)
        self._idle.clear()
        self._known.clear()
        self._key.clear()

    def reset(self) -> None:
        """Nobody uses any page, whatever the books say."""
        self.forget()
        self._users = [1, *[0] * (len(self._users) - 1)]
        for page in range(1, len(self._users)):
            self._put_back(page)
        self._dirty.clear()


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """Key of the page that holds `tokens` and follows the page with key `before` (b"" for the first)."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()
