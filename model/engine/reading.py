"""Absorbed attention over the paged cache.

What is read is planned once a step and used by every layer. Rows of similar length are read together, from a
gathered copy; a long row whose pages lie in a few pieces is read where it lies, so that at long context a
step costs the reading of its cache and no copy of it. On a Hopper GPU `kernels.attention.mla_decode` reads
all rows through their page tables, and there is nothing to plan.
Legend: B rows, T new tokens a row, H heads, W latent width (C + R), C key-value rank, L cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.attention import fused
from model.engine.pages import PAGE, SCRATCH
from model.engine.tiles import TILE, padded

LONG = 1024
"""Cached positions from which a row is read on its own."""
PIECES = 8
"""Most pieces that a row may lie in to be read in place."""
CHUNK = 128
"""Cached positions that the invariant mode reads at a time."""


@dataclass
class Bucket:
    """Rows that are read together from a gathered copy."""

    rows: Tensor | None  # which of the B rows; None: all of them, in order
    pages: Tensor  # [b * L / PAGE]
    blocked_bTL: Tensor | None  # True at positions that a token must not see


@dataclass
class Alone:
    """A long row, read where it lies."""

    row: int
    pieces: list[slice]
    blocked_TL: Tensor | None


@dataclass
class Plan:
    parts: list[Bucket | Alone]
    first: int = 0
    """Positions before this one are not read: the drafting layer has nothing at position 0."""


@dataclass
class Paged:
    """Every token's own page table and how many positions it sees: what the kernel reads."""

    table_SP: Tensor
    seen_S: Tensor
    first: int


def own_pages(table_BP: np.ndarray) -> np.ndarray:
    """Page tables in which a row's first page stands for those that it does not have: what a row reads with
    weight zero is its own, and no other's NaN."""
    return np.where(table_BP == SCRATCH, table_BP[:, :1], table_BP)


def plan(table_BP: np.ndarray, seen_BT: np.ndarray, device: torch.device, first: int = 0) -> Plan | Paged:
    """How to read the cache for rows with page tables `table_BP` whose new tokens see the first `seen_BT`
    positions each (the token's own included)."""
    longest_B = seen_BT.max(1)
    if fused(device):
        table_SP = np.repeat(table_BP[:, : -(-int(longest_B.max()) // PAGE)], seen_BT.shape[1], 0)
        seen_S = torch.from_numpy(seen_BT.reshape(-1)).to(device)
        return Paged(torch.from_numpy(table_SP).to(device), seen_S, first)
    table_BP = own_pages(table_BP)
    parts: list[Bucket | Alone] = []
    short = np.flatnonzero(longest_B < LONG)
    together: dict[int, list[int]] = {0: short.tolist()} if len(short) else {}
    for row in np.flatnonzero(longest_B >= LONG).tolist():
        pages = table_BP[row, : -(-int(longest_B[row]) // PAGE)]
        starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
        if len(starts) > PIECES:
            together.setdefault(int(longest_B[row]).bit_length(), []).append(row)
            continue
        ends = [*starts[1:], len(pages)]
        pieces = [
            slice(int(pages[a]) * PAGE, (int(pages[b - 1]) + 1) * PAGE)
            for a, b in zip(starts, ends, strict=True)
        ]
        # Cut to what the last token sees, so that a single one needs no mask.
        end = int(longest_B[row])
        pieces[-1] = slice(pieces[-1].start, pieces[-1].stop - (len(pages) * PAGE - end))
        pieces[0] = slice(pieces[0].start + first, pieces[0].stop)
        blocked = _blocked(seen_BT[row : row + 1] - first, end - first, 0, device)
        parts.append(Alone(row, pieces, None if blocked is None else blocked[0]))
    if 0 in together:
        # Rows of similar length go together: a row is padded to at most twice its length.
        rows = together.pop(0)
        if 2 * longest_B[rows].min() < longest_B[rows].max() and longest_B[rows].max() > CHUNK:
            for row in rows:
                together.setdefault(max(CHUNK, int(longest_B[row]) - 1).bit_length(), []).append(row)
        else:
            together[0] = rows
    for rows in together.values():
        deepest = -(-int(longest_B[rows].max()) // PAGE)
        parts.append(
            Bucket(
                None if len(rows) == len(longest_B) else torch.tensor(rows, device=device),
                torch.from_numpy(table_BP[rows, :deepest].reshape(-1)).to(device),
                _blocked(seen_BT[rows], deepest * PAGE, first, device),
            )
        )
    return Plan(parts, first)


def _blocked(seen_bT: np.ndarray, length: int, first: int, device: torch.device) -> Tensor | None:
    """True at positions a token must not see: those not written yet, and those before `first`."""
    if not first and (seen_bT == length).all():
        return None
    positions = np.arange(length)
    return torch.from_numpy((positions >= seen_bT[..., None]) | (positions < first)).to(device)


def read(query_BTHW: Tensor, latents: Tensor, rank: int, plan: Plan | Paged) -> Tensor:
    """softmax(query . latent) latent of every new token and head -> [B, T, H, C], where C = `rank`.

    The query already carries the factor on scores.
    """
    if isinstance(plan, Paged):
        return _read_paged(query_BTHW, latents, rank, plan)
    if len(plan.parts) == 1 and isinstance(plan.parts[0], Bucket):
        return _read_bucket(query_BTHW, latents, rank, plan.parts[0])
    out = query_BTHW.new_empty(*query_BTHW.shape[:-1], rank)
    for part in plan.parts:
        if isinstance(part, Alone):
            out[part.row] = _read_alone(query_BTHW[part.row], latents, rank, part)
        elif part.rows is None:
            out = _read_bucket(query_BTHW, latents, rank, part)
        else:
            out[part.rows] = _read_bucket(query_BTHW[part.rows], latents, rank, part)
    return out


def _read_paged(query_BTHW: Tensor, latents: Tensor, rank: int, paged: Paged) -> Tensor:
    from kernels.attention.mla_decode import mla_decode

    query_SHW = query_BTHW.flatten(0, 1)
    tables = (paged.table_SP, paged.seen_S)
    out_SHC = mla_decode(query_SHW, latents, *tables, 1.0, rank=rank, page=PAGE, first=paged.first)
    return out_SHC.unflatten(0, query_BTHW.shape[:2])


def gathered(latents: Tensor, pages: Tensor) -> Tensor:
    """Copies of whole pages, one after the other: [pages * PAGE, W]."""
    width = latents.shape[1]
    return latents.view(-1, PAGE * width).index_select(0, pages).view(-1, width)


def _read_bucket(query_bTHW: Tensor, latents: Tensor, rank: int, bucket: Bucket) -> Tensor:
    b, t, heads, width = query_bTHW.shape
    keys_bLW = gathered(latents, bucket.pages).view(b, -1, width)
    scores = torch.bmm(query_bTHW.reshape(b, t * heads, width), keys_bLW.transpose(1, 2))
    if bucket.blocked_bTL is not None:
        scores.view(b, t, heads, -1).masked_fill_(bucket.blocked_bTL[:, :, None], float("-inf"))
    probs = scores.softmax(-1, dtype=torch.float32).to(keys_bLW.dtype)
    return torch.bmm(probs, keys_bLW[..., :rank]).view(b, t, heads, rank)


def _read_alone(query_THW: Tensor, latents: Tensor, rank: int, alone: Alone) -> Tensor:
    t, heads, width = query_THW.shape
    query = query_THW.reshape(t * heads, width)
    found = [query @ latents[piece].t() for piece in alone.pieces]
    scores = found[0] if len(found) == 1 else torch.cat(found, -1)
    if alone.blocked_TL is not None:
        scores.view(t, heads, -1).masked_fill_(alone.blocked_TL[:, None], float("-inf"))
    probs = scores.softmax(-1, dtype=torch.float32).to(latents.dtype)
    shares = probs.split([piece.stop - piece.start for piece in alone.pieces], -1)
    out = shares[0] @ latents[alone.pieces[0], :rank]
    for share, piece in zip(shares[1:], alone.pieces[1:], strict=True):
        out.addmm_(share, latents[piece, :rank])
    return out.view(t, heads, rank)


@dataclass
class Every:
    """What the invariant mode reads, token by token."""

    table_SP: Tensor  # page tables, in whole chunks
    seen: np.ndarray  # [S], how many positions each token sees
    first: int


def read_invariant(query_SHW: Tensor, latents: Tensor, rank: int, every: Every) -> Tensor:
    """The same for tokens one by one, in fixed shapes of TILE tokens by CHUNK positions -> [S, H, C].

    A chunk past a token's own positions adds exact zeros.
    """
    count = query_SHW.shape[0]
    query_SHW, table_SP = padded(query_SHW), padded(every.table_SP)
    # Padding sees one position, so that no softmax is empty.
    seen = np.concatenate((every.seen, np.full(-count % TILE, every.first + 1)))
    out = []
    for i in range(0, query_SHW.shape[0], TILE):
        tile = slice(i, i + TILE)
        out.append(_read_tile(query_SHW[tile], latents, rank, table_SP[tile], seen[tile], every.first))
    return torch.cat(out)[:count]


def _read_tile(
    query: Tensor, latents: Tensor, rank: int, table: Tensor, seen: np.ndarray, first: int
) -> Tensor:
    length = -(-int(seen.max()) // CHUNK) * CHUNK
    each, pages = CHUNK // PAGE, latents.view(-1, PAGE, latents.shape[1])
    keys = [pages[table[:, at : at + each]].flatten(1, 2) for at in range(0, length // PAGE, each)]
    scores = torch.cat([torch.bmm(query, chunk.transpose(1, 2)) for chunk in keys], -1)
    positions = np.arange(length)
    blocked = torch.from_numpy((positions >= seen[:, None]) | (positions < first)).to(query.device)
    scores.masked_fill_(blocked[:, None], float("-inf"))
    probs = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    out = query.new_zeros(*query.shape[:2], rank)
    for number, chunk in enumerate(keys):
        out += torch.bmm(probs[..., number * CHUNK : (number + 1) * CHUNK], chunk[..., :rank])
    return out
