"""Attention while decoding, over paged latents: mla_decode.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.attention import mla_decode
from kernels.bench.attention import MAX_ERROR
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape, Sizes
from kernels.bench.shapes import HEADS, LATENT, LENGTH, QK_WIDTH, ROTARY
from kernels.metrics import relative_error

PAGE = 16
SCALE = QK_WIDTH**-0.5
# Rows, cached positions of each, heads, and the widths of the latent and of the rotary key.
CHECKED = ((1, 1, 3, 16, 8), (3, 7, 16, 32, 16), (5, 129, 17, 64, 16), (2, 1100, 64, 64, 32))
TIMED = [
    Shape("", (rows, length, HEADS, LATENT, ROTARY))
    for rows, length in itertools.product((16, 128), (LENGTH, 4 * LENGTH))
]
SMALL = (4, 512, 16, LATENT, ROTARY)


def flops(rows: int, length: int, heads: int, rank: int, rotary: int) -> int:
    """Scores and weighted sum of all heads."""
    return rows * length * heads * 2 * (rank + rotary + rank)


def moved(rows: int, length: int, heads: int, rank: int, rotary: int, width: int) -> int:
    """Bytes of the cache and of the table of its pages, of queries and of outputs."""
    cache = length * (rank + rotary) * width + 4 * -(-length // PAGE) + 4
    return rows * (cache + heads * (rank + rotary + rank) * width)


def make(
    draw: Draw, rows: int, length: int, heads: int, rank: int, rotary: int, dtype: torch.dtype
) -> Inputs:
    """Queries, latents, page table, lengths and rank. Pages lie in any order; checks have any lengths."""
    pages = -(-length // PAGE)
    table = draw.uniform(rows * pages).argsort().view(rows, pages).int()
    lengths = torch.full((rows,), length, device=draw.device)
    if draw.rough:
        lengths[1:] = draw.integers(length + 1, rows - 1)
    query = draw.values(rows, heads, rank + rotary, dtype=dtype, outliers=2.0)
    latents = draw.values(rows * pages * PAGE, rank + rotary, dtype=dtype, outliers=2.0)
    return query, latents, table, lengths.int(), rank


def call(
    query: torch.Tensor, latents: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, rank: int
) -> torch.Tensor:
    return mla_decode.mla_decode(query, latents, table, lengths, SCALE, rank=rank, page=PAGE)


def cache_of(latents: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The latents of one row, in the order of their positions."""
    return latents.view(-1, PAGE, latents.shape[1])[pages.long()].flatten(0, 1)


def error(inputs: Inputs, found: torch.Tensor) -> float:
    query, latents, table, lengths, rank = inputs
    exact = torch.zeros(found.shape, dtype=torch.float64, device=found.device)
    for row, length in enumerate(lengths.tolist()):
        if length:
            seen = cache_of(latents, table[row])[:length].double()
            exact[row] = (query[row].double() @ seen.t() * SCALE).softmax(dim=1) @ seen[:, :rank]
    return relative_error(found, exact)


def composed(
    query: torch.Tensor, latents: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, rank: int
) -> Callable[[], torch.Tensor]:
    """Two products and a softmax, over a cache without pages in which every row is of the same length."""
    cache = torch.stack([cache_of(latents, pages) for pages in table])[:, : int(lengths[0])]
    keys, values = cache.mT, cache[..., :rank]
    return lambda: torch.bmm((torch.bmm(query, keys) * SCALE).softmax(dim=2), values)


def entry(
    operands: str, dtype: torch.dtype, timed: Sequence[Shape] = (), small: Sizes | None = None
) -> Entry:
    return Entry(
        "mla_decode",
        operands,
        partial(make, dtype=dtype),
        call,
        error,
        f"relative error, {operands}",
        MAX_ERROR[dtype],
        CHECKED,
        moved=partial(moved, width=dtype.itemsize),
        flops=flops,
        exact=(),
        timed=timed,
        small=small,
        peers=[Peer("bmm, softmax, bmm without pages", composed, "any")],
        kernel="decode_triton",
    )


ENTRIES = [entry("BF16", torch.bfloat16, TIMED), entry("FP32", torch.float32, small=SMALL)]
