"""Multi-head latent attention while decoding: over the paged cache of latents, in the absorbed form.

A cached position is one latent of `rank` values and one rotary key, for all heads. With the expansions of
keys and values moved into the query and behind the weighted sum (report, section 2.1.1), latents are both:

    scores = query . (latent, rotary key) * scale          out = softmax(scores) . latents

A row's positions are split into stretches of SPLIT, for each of which one program a group of heads makes a
part of the output and its log-sum-exp; a second kernel adds the parts in order. A split is the same whatever
the batch, so the bits of a row depend on its own query, positions and length alone. Lengths are read on the
device. Memory is read once for each group of 64 heads, whose programs run side by side: at 128 heads the
second reading finds the L2 cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kernels.attention.mla_tiles import check_widths, load_rows, padded_width, runs_triton, store_rows
from kernels.backend import jit, tl

# Positions of a split: longer ones would leave multiprocessors idle in small batches, and shorter ones write
# more parts: one is 2 KiB a head, against 1,152 bytes of cache a position.
SPLIT = 1024
WIDEST = (512, 64)  # rank and R for which the tiles fit into shared memory
COMBINE_OPTIONS = {"num_warps": 4}


@dataclass(frozen=True)
class Config:
    """Launch shape: a program holds the output of `heads` heads and reads `positions` at a time."""

    heads: int
    positions: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# The output of 64 heads, 512 wide, fills half of the registers. With fewer than 64 the tensor core runs
# Ampere's instructions, which take 16 rows.
MANY_HEADS = Config(heads=64, positions=64, num_warps=8, num_stages=2)
FEW_HEADS = Config(heads=16, positions=64, num_warps=8, num_stages=2)
FP32 = Config(heads=16, positions=16, num_warps=8, num_stages=1)


def mla_decode(
    query: torch.Tensor,
    latents: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    rank: int,
    page: int = 16,
    first: int = 0,
) -> torch.Tensor:
    """Weighted latents of every head, [B, H, rank], for one new position a row: query [B, H, rank + R].

    latents [slots, rank + R] is the cache, R the width of the rotary key: position i of a row lies in slot
    page_table[row, i // page] * page + i % page. page_table is [B, pages] and lengths [B], int32 or int64. A
    row sees positions from `first` up to its length; if there are none, its output is 0. Nothing else of the
    cache or the table is read, so slots that are not used may hold anything. Several new positions of one
    request are rows of their own. Query and latents are both FP32 or both BF16; the output is of their type.

    On a GPU rank and R are at most 512 and 64, and the values of lengths and page_table are not checked,
    since that would wait for the device.

    Raises:
        ValueError, TypeError: shapes, types, devices, numbers or, on a CPU, lengths or pages do not fit.
        RuntimeError: the tensors are on a GPU that the kernels do not support.
    """
    _check(query, latents, page_table, lengths, scale, rank, page, first)
    decode = decode_triton if runs_triton("mla_decode", query) else decode_reference
    return decode(query, latents, page_table, lengths, scale, rank, page, first)


def decode_reference(
    query: torch.Tensor,
    latents: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    rank: int,
    page: int = 16,
    first: int = 0,
) -> torch.Tensor:
    """The PyTorch reference, on any device, in FP32 and row by row."""
    out = query.new_zeros(*query.shape[:2], rank)
    for row, length in enumerate(lengths.tolist()):
        if length <= first:
            continue
        positions = torch.arange(first, length, device=query.device)
        slots = page_table[row, positions // page].long() * page + positions % page
        seen = latents[slots].float()
        probabilities = (query[row].float() @ seen.t() * scale).softmax(-1)
        out[row] = (probabilities @ seen[:, :rank]).to(out.dtype)
    return out


def decode_triton(
    query: torch.Tensor,
    latents: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    rank: int,
    page: int = 16,
    first: int = 0,
) -> torch.Tensor:
    """The Triton kernels: what `mla_decode` runs on a GPU."""
    rows, heads, width = query.shape
    check_widths("mla_decode", (rank, width - rank), WIDEST)
    out = query.new_empty(rows, heads, rank)
    if out.numel() == 0:
        return out
    config, pages = config_for(heads, query.dtype), page_table.shape[1]
    splits = -(-pages * page // SPLIT)
    parts = query.new_empty((rows, splits, heads, rank), dtype=torch.float32)
    lse = query.new_empty((rows, splits, heads), dtype=torch.float32)
    lengths = lengths.contiguous()
    with torch.cuda.device_of(query):
        if splits > 0:
            decode_kernel[(rows * splits * -(-heads // config.heads),)](
                query.contiguous(), latents, page_table.contiguous(), lengths, out, parts, lse,
                heads, pages, splits, first, scale,
                C=rank, R=width - rank, C_PAD=padded_width(rank), R_PAD=padded_width(width - rank),
                PAGE=page, SPLIT=SPLIT, HEADS=config.heads, BLOCK=config.positions, **config.options,
            )  # fmt: skip
        combine_kernel[(rows * heads,)](
            parts, lse, lengths, out, heads, splits, first,
            C=rank, C_PAD=padded_width(rank), SPLIT=SPLIT, **COMBINE_OPTIONS,
        )  # fmt: skip
    return out


def config_for(heads: int, dtype: torch.dtype) -> Config:
    """The launch shape for so many heads."""
    if dtype == torch.float32:
        return FP32
    return MANY_HEADS if heads > 32 else FEW_HEADS


def _check(
    query: torch.Tensor,
    latents: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    rank: int,
    page: int,
    first: int,
) -> None:
    if (
        (query.dim(), latents.dim(), page_table.dim(), lengths.dim()) != (3, 2, 2, 1)
        or query.shape[2] != latents.shape[1]
        or not query.shape[0] == page_table.shape[0] == lengths.shape[0]
    ):
        raise ValueError(
            f"mla_decode: query is {tuple(query.shape)}, latents {tuple(latents.shape)}, page_table "
            f"{tuple(page_table.shape)}, lengths {tuple(lengths.shape)}; they must be [rows, heads, width], "
            "[slots, width], [rows, pages] and [rows]"
        )
    if not 0 < rank < query.shape[2]:
        raise ValueError(f"mla_decode: rank is {rank}; it must lie between 1 and {query.shape[2] - 1}")
    if page < 1 or first < 0 or latents.shape[0] % page:
        raise ValueError(
            f"mla_decode: page is {page}, first {first}, and latents have {latents.shape[0]} slots; page "
            "must be at least 1, first at least 0, and the slots whole pages"
        )
    if query.dtype not in (torch.float32, torch.bfloat16) or latents.dtype != query.dtype:
        raise TypeError(
            f"mla_decode: query is {query.dtype} and latents {latents.dtype}; both must be torch.float32 or "
            "both torch.bfloat16"
        )
    for name, tensor in (("page_table", page_table), ("lengths", lengths)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"mla_decode: {name} is {tensor.dtype}; use torch.int32 or torch.int64")
    for name, tensor in (("latents", latents), ("page_table", page_table), ("lengths", lengths)):
        if tensor.device != query.device:
            raise ValueError(
                f"mla_decode: {name} is on {tensor.device}, query on {query.device}; move one of them"
            )
    if not latents.is_contiguous():
        raise ValueError("mla_decode: latents must be contiguous, since a copy of the cache would be slow")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"mla_decode: scale is {scale}; it must be finite and above 0")
    if query.device.type == "cpu" and query.shape[0] > 0:
        _check_values(page_table, lengths, page, latents.shape[0] // page)


def _check_values(page_table: torch.Tensor, lengths: torch.Tensor, page: int, pages: int) -> None:
    room, low, high = page_table.shape[1] * page, int(lengths.min()), int(lengths.max())
    if low < 0 or high > room:
        raise ValueError(
            f"mla_decode: lengths reach from {low} to {high}; this page_table has room for 0 to {room}"
        )
    used = torch.arange(page_table.shape[1]) * page < lengths[:, None]
    if ((page_table < 0) | (page_table >= pages))[used].any():
        raise ValueError(f"mla_decode: page_table names a page outside the cache, which has {pages}")


# Knowing that there is one split, the compiler keeps more in registers than there are, and spills.
@jit(do_not_specialize=("splits",))
def decode_kernel(
    query, latents, page_table, lengths, out, parts, lse, heads, pages, splits, begin, scale,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one split of one row, for HEADS heads. Those of the same split follow each other."""
    groups = tl.cdiv(heads, HEADS)
    group = tl.program_id(0) % groups
    split = tl.program_id(0) // groups % splits
    row = (tl.program_id(0) // groups // splits).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    low = tl.maximum(split * SPLIT, begin)
    high = tl.minimum(split * SPLIT + SPLIT, length)
    if low >= high:
        return
    head = group * HEADS + tl.arange(0, HEADS)
    # Heads past the last read it again and are never stored.
    head_in = tl.minimum(head, heads - 1)
    query += row * heads * (C + R)
    q_latent = load_rows(query, head_in, C + R, C, C_PAD)
    q_rotary = load_rows(query + C, head_in, C + R, R, R_PAD)
    page_table += row * pages
    local = tl.arange(0, BLOCK)

    total = tl.zeros((HEADS, C_PAD), dtype=tl.float32)
    biggest = tl.full((HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((HEADS,), dtype=tl.float32)
    for position in tl.range(low, high, BLOCK):
        # Past the end the last position is read again, with weight 0: never a slot that is not the row's.
        seen = tl.minimum(position + local, high - 1)
        slot = tl.load(page_table + seen // PAGE).to(tl.int64) * PAGE + seen % PAGE
        latent = load_rows(latents, slot, C + R, C, C_PAD)
        rotary = load_rows(latents + C, slot, C + R, R, R_PAD)
        scores = tl.dot(q_latent, latent.T, input_precision="ieee")
        scores = tl.dot(q_rotary, rotary.T, scores, input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where((position + local < high)[None, :], scores, float("-inf"))
        bigger = tl.maximum(biggest, tl.max(scores, axis=1))
        p = tl.exp2(scores - bigger[:, None])
        shrink = tl.exp2(biggest - bigger)
        mass = mass * shrink + tl.sum(p, axis=1)
        total = tl.dot(p.to(latent.dtype), latent, total * shrink[:, None], input_precision="ieee")
        biggest = bigger
    total = total / mass[:, None]
    if begin // SPLIT == (length - 1) // SPLIT:  # the only split
        store_rows(out + row * heads * C, total, head, head < heads, C, C, C_PAD)
    else:
        at = (row * splits + split) * heads
        store_rows(parts + at * C, total, head, head < heads, C, C, C_PAD)
        tl.store(lse + at + head, biggest + tl.log2(mass), mask=head < heads)


@jit
def combine_kernel(
    parts, lse, lengths, out, heads, splits, begin,
    C: tl.constexpr, C_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row, its splits added in order. A row of one split is finished already."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    length = tl.load(lengths + row).to(tl.int32)
    low = begin // SPLIT
    high = tl.where(length > begin, tl.cdiv(length, SPLIT), low)
    if high - low == 1:
        return
    col = tl.arange(0, C_PAD)
    total = tl.zeros((C_PAD,), dtype=tl.float32)
    biggest = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    for split in tl.range(low, high):
        at = (row * splits + split) * heads + head
        weight = tl.load(lse + at)
        part = tl.load(parts + at * C + col, mask=col < C, other=0.0)
        bigger = tl.maximum(biggest, weight)
        shrink = tl.exp2(biggest - bigger)
        p = tl.exp2(weight - bigger)
        mass = mass * shrink + p
        total = total * shrink + p * part
        biggest = bigger
    # A row that sees nothing has no mass, and its output is 0.
    total = total / tl.where(high > low, mass, 1.0)
    tl.store(out + (row * heads + head) * C + col, total.to(out.dtype.element_ty), mask=col < C)
