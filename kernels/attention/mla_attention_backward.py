"""Gradients of multi-head latent attention (see `kernels.attention.mla_attention`).

The probabilities are made again from the scores and each row's log-sum-exp:

    p  = exp(scores - lse)                     ds = p * (do . v - delta), delta = sum(do * out) of a row
    dv = p.T @ do        dk = ds.T @ q * scale        dq = ds @ k * scale

One kernel walks over the keys of a tile of queries for dq, another over the queries of a tile of keys for dk
and dv, so that every sum has one owner and a fixed order, and no addition is atomic. That makes the products
behind p and ds twice: 1,152 for a pair of positions and head instead of 832 at the published widths. The
gradient of the rotary key is kept for each head in FP32, [B, H, T, R], and then summed over heads. For BF16,
p and ds are rounded to BF16 before they are multiplied; sums are FP32.
"""

from __future__ import annotations

import torch

from kernels.attention.mla_tiles import (
    LOG2E,
    Config,
    document_ends,
    document_tiles,
    load_rows,
    position_of,
    score_chunks,
    store_rows,
    width_constants,
    widths,
)
from kernels.backend import jit, tl

# Of dq, block_m queries belong to a program, which walks over the keys block_n at a time. With 128 keys a
# step it would spill.
DQ_CONFIGS = {
    torch.bfloat16: Config(block_m=128, block_n=64, num_warps=8, num_stages=3),
    torch.float32: Config(block_m=32, block_n=32, num_warps=8, num_stages=1),
}
# Of dk and dv, block_n keys belong to a program, which walks over the queries block_m at a time. The sums
# alone, 320 wide, take 160 registers of a thread: with 64 queries a step it would spill.
DKV_CONFIGS = {
    torch.bfloat16: Config(block_m=32, block_n=128, num_warps=8, num_stages=3),
    torch.float32: Config(block_m=16, block_n=32, num_warps=8, num_stages=1),
}
DELTA_ROWS = 32  # rows that one program of the delta kernel sums
DELTA_OPTIONS = {"num_warps": 4}


def gradients_reference(
    grad: torch.Tensor,
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The PyTorch reference, on any device, in FP32: gradients of q, key_value and key_rotary.

    `grad` is that of `out`; `out` and `lse` are what the forward pass gave.
    """
    n, _, _ = widths(q, key_value, key_rotary)
    dq = torch.empty_like(q)
    d_key_value = torch.zeros_like(key_value, dtype=torch.float32)
    d_key_rotary = torch.zeros_like(key_rotary, dtype=torch.float32)
    for rows, scores in score_chunks(q, key_value, key_rotary, scale, starts):
        seen = slice(0, rows.stop)
        both, shared = key_value[:, seen].float(), key_rotary[:, seen].float()
        queries, above = q[:, rows].float(), grad[:, rows].float()
        p = torch.exp2(scores * LOG2E - lse[..., rows, None])
        d_key_value[:, seen, :, n:] += torch.einsum("bhml,bmhv->blhv", p, above)
        delta = (above * out[:, rows].float()).sum(-1).transpose(1, 2)
        ds = p * (torch.einsum("bmhv,blhv->bhml", above, both[..., n:]) - delta[..., None]) * scale
        dq[:, rows, :, :n] = torch.einsum("bhml,blhn->bmhn", ds, both[..., :n])
        dq[:, rows, :, n:] = torch.einsum("bhml,blr->bmhr", ds, shared)
        d_key_value[:, seen, :, :n] += torch.einsum("bhml,bmhn->blhn", ds, queries[..., :n])
        d_key_rotary[:, seen] += torch.einsum("bhml,bmhr->blr", ds, queries[..., n:])
    return dq, d_key_value.to(q.dtype), d_key_rotary.to(q.dtype)


def gradients_triton(
    grad: torch.Tensor,
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Triton kernels of `gradients_reference`, over contiguous tensors."""
    if out.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(key_value), torch.zeros_like(key_rotary)
    batch, length, heads, _ = q.shape
    sizes = widths(q, key_value, key_rotary)
    constants = width_constants(sizes)
    ends = None if starts is None else document_ends(starts)
    delta = torch.empty_like(lse)
    dq, d_key_value = torch.empty_like(q), torch.empty_like(key_value)
    by_head = q.new_empty((batch, heads, length, sizes[1]), dtype=torch.float32)
    with torch.cuda.device_of(q):
        delta_kernel[(-(-length // DELTA_ROWS), heads, batch)](
            grad, out, delta, length, heads,
            V=constants["V"], V_PAD=constants["V_PAD"], ROWS=DELTA_ROWS, **DELTA_OPTIONS,
        )  # fmt: skip
        config = DKV_CONFIGS[q.dtype]
        dkv_kernel[(-(-length // config.block_n), heads, batch)](
            grad, q, key_value, key_rotary, lse, delta, starts, ends, d_key_value, by_head,
            length, heads, scale, **constants,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **config.options,
        )  # fmt: skip
        config = DQ_CONFIGS[q.dtype]
        dq_kernel[(-(-length // config.block_m), heads, batch)](
            grad, q, key_value, key_rotary, lse, delta, starts, dq, length, heads, scale,
            **constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **config.options,
        )  # fmt: skip
    return dq, d_key_value, by_head.sum(1).to(q.dtype)


@jit
def delta_kernel(
    grad, out, delta, T, heads,
    V: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: sum(grad * out) of ROWS rows of one head."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * ROWS
    local = tl.arange(0, ROWS)
    row_in = tl.minimum(local, T - 1 - first)
    at = ((batch * T + first) * heads + head) * V
    above = load_rows(grad + at, row_in, heads * V, V, V_PAD).to(tl.float32)
    value = load_rows(out + at, row_in, heads * V, V, V_PAD).to(tl.float32)
    tl.store(
        delta + (batch * heads + head) * T + first + local,
        tl.sum(above * value, axis=1),
        mask=first + local < T,
    )


@jit
def dq_kernel(
    grad, q, key_value, key_rotary, lse, delta, starts, dq, T, heads, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    N_PAD: tl.constexpr, R_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head. Order and tiles are those of the forward kernel."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = tile * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    row = first + local
    row_in = tl.minimum(local, T - 1 - first)
    at = (batch * T + first) * heads + head
    q_content = load_rows(q + at * (N + R), row_in, heads * (N + R), N, N_PAD)
    q_rotary = load_rows(q + at * (N + R) + N, row_in, heads * (N + R), R, R_PAD)
    above = load_rows(grad + at * V, row_in, heads * V, V, V_PAD)
    side = (batch * heads + head) * T + first
    row_lse = tl.load(lse + side + row_in)
    row_delta = tl.load(delta + side + row_in)
    key_value += (batch * T * heads + head) * (N + V)
    key_rotary += batch * T * R

    low, whole, start = 0, 0, None
    if starts is not None:
        start, low, whole = document_tiles(starts + batch * T, first, row_in, T, BLOCK_M, BLOCK_N)
    before = (whole - low) // BLOCK_N
    diagonal = tl.cdiv(tl.minimum(first + BLOCK_M, T) - first, BLOCK_N)

    dq_content = tl.zeros((BLOCK_M, N_PAD), dtype=tl.float32)
    dq_rotary = tl.zeros((BLOCK_M, R_PAD), dtype=tl.float32)
    dq_content, dq_rotary = dq_tiles(
        dq_content, dq_rotary, q_content, q_rotary, above, row_lse, row_delta, key_value, key_rotary, row,
        start, low, before, first, before + diagonal, T, heads * (N + V), scale * 1.4426950408889634,
        N, R, V, N_PAD, R_PAD, V_PAD, BLOCK_N, True,
    )  # fmt: skip
    dq_content, dq_rotary = dq_tiles(
        dq_content, dq_rotary, q_content, q_rotary, above, row_lse, row_delta, key_value, key_rotary, row,
        start, whole, 0, whole, (first - whole) // BLOCK_N, T, heads * (N + V), scale * 1.4426950408889634,
        N, R, V, N_PAD, R_PAD, V_PAD, BLOCK_N, False,
    )  # fmt: skip
    store_rows(dq + at * (N + R), dq_content * scale, local, row < T, heads * (N + R), N, N_PAD)
    store_rows(dq + at * (N + R) + N, dq_rotary * scale, local, row < T, heads * (N + R), R, R_PAD)


@jit
def dq_tiles(
    dq_content, dq_rotary, q_content, q_rotary, above, row_lse, row_delta, key_value, key_rotary, row, start,
    low, lead, then, count, T, stride, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    N_PAD: tl.constexpr, R_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what `count` tiles of keys give to dq, the factor on scores left out."""
    for step in tl.range(0, count):
        first = position_of(step, low, lead, then, BLOCK_N)
        local = tl.arange(0, BLOCK_N)
        if MASKED:
            local = tl.minimum(local, T - 1 - first)
        at = key_value + first.to(tl.int64) * stride
        content = load_rows(at, local, stride, N, N_PAD)
        rotary = load_rows(key_rotary + first.to(tl.int64) * R, local, R, R, R_PAD)
        values = load_rows(at + N, local, stride, V, V_PAD)
        scores = tl.dot(q_content, content.T, input_precision="ieee")
        scores = tl.dot(q_rotary, rotary.T, scores, input_precision="ieee")
        p = tl.exp2(scores * scale - row_lse[:, None])
        if MASKED:
            col = first + tl.arange(0, BLOCK_N)
            seen = col[None, :] <= row[:, None]
            if start is not None:
                seen = seen & (col[None, :] >= start[:, None])
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(above, values.T, input_precision="ieee")
        ds = (p * (dp - row_delta[:, None])).to(content.dtype)
        dq_content = tl.dot(ds, content, dq_content, input_precision="ieee")
        dq_rotary = tl.dot(ds, rotary, dq_rotary, input_precision="ieee")
    return dq_content, dq_rotary


@jit
def dkv_kernel(
    grad, q, key_value, key_rotary, lse, delta, starts, ends, d_key_value, by_head, T, heads, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    N_PAD: tl.constexpr, R_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one head, over all queries that see them. The first keys are
    seen by most and come first."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    local = tl.arange(0, BLOCK_N)
    col = first + local
    col_in = tl.minimum(local, T - 1 - first)
    at = (batch * T + first) * heads + head
    content = load_rows(key_value + at * (N + V), col_in, heads * (N + V), N, N_PAD)
    values = load_rows(key_value + at * (N + V) + N, col_in, heads * (N + V), V, V_PAD)
    rotary = load_rows(key_rotary + (batch * T + first) * R, col_in, R, R, R_PAD)
    q += (batch * T * heads + head) * (N + R)
    grad += (batch * T * heads + head) * V
    lse += (batch * heads + head) * T
    delta += (batch * heads + head) * T

    # Queries before `whole` may be earlier than a key, those from `rest` on in a later document than a key.
    whole = tl.minimum(first + BLOCK_N, T)
    early = T
    end = T
    if starts is not None:
        starts += batch * T
        early = tl.load(ends + batch * T + first)
        end = tl.load(ends + batch * T + whole - 1)
    rest = tl.maximum(whole, early // BLOCK_M * BLOCK_M)
    diagonal = tl.cdiv(whole - first, BLOCK_M)
    after = tl.cdiv(tl.maximum(end - rest, 0), BLOCK_M)

    dk_content = tl.zeros((BLOCK_N, N_PAD), dtype=tl.float32)
    dk_rotary = tl.zeros((BLOCK_N, R_PAD), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, V_PAD), dtype=tl.float32)
    dk_content, dk_rotary, dv = dkv_tiles(
        dk_content, dk_rotary, dv, content, rotary, values, q, grad, lse, delta, starts, col,
        first, diagonal, rest, diagonal + after, T, heads, scale * 1.4426950408889634,
        N, R, V, N_PAD, R_PAD, V_PAD, BLOCK_M, True,
    )  # fmt: skip
    dk_content, dk_rotary, dv = dkv_tiles(
        dk_content, dk_rotary, dv, content, rotary, values, q, grad, lse, delta, starts, col,
        whole, 0, whole, (rest - whole) // BLOCK_M, T, heads, scale * 1.4426950408889634,
        N, R, V, N_PAD, R_PAD, V_PAD, BLOCK_M, False,
    )  # fmt: skip
    inside = col < T
    store_rows(d_key_value + at * (N + V), dk_content * scale, local, inside, heads * (N + V), N, N_PAD)
    store_rows(d_key_value + at * (N + V) + N, dv, local, inside, heads * (N + V), V, V_PAD)
    rows_at = by_head + ((batch * heads + head) * T + first) * R
    store_rows(rows_at, dk_rotary * scale, local, inside, R, R, R_PAD)


@jit
def dkv_tiles(
    dk_content, dk_rotary, dv, content, rotary, values, q, grad, lse, delta, starts, col,
    low, lead, then, count, T, heads, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    N_PAD: tl.constexpr, R_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what `count` tiles of queries give to dk and dv, the factor on scores left out of dk.

    Keys lie along the rows of a tile of scores, so that p and ds are multiplied where they are: in registers.
    """
    for step in tl.range(0, count):
        first = position_of(step, low, lead, then, BLOCK_M)
        local = tl.arange(0, BLOCK_M)
        row = first + local
        if MASKED:
            local = tl.minimum(local, T - 1 - first)
        at = q + first.to(tl.int64) * (heads * (N + R))
        q_content = load_rows(at, local, heads * (N + R), N, N_PAD)
        q_rotary = load_rows(at + N, local, heads * (N + R), R, R_PAD)
        above = load_rows(grad + first.to(tl.int64) * (heads * V), local, heads * V, V, V_PAD)
        row_lse = tl.load(lse + first + local)
        row_delta = tl.load(delta + first + local)
        scores = tl.dot(content, q_content.T, input_precision="ieee")
        scores = tl.dot(rotary, q_rotary.T, scores, input_precision="ieee")
        p = tl.exp2(scores * scale - row_lse[None, :])
        if MASKED:
            seen = (col[:, None] <= row[None, :]) & (row < T)[None, :]
            if starts is not None:
                seen = seen & (col[:, None] >= tl.load(starts + first + local)[None, :])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(above.dtype), above, dv, input_precision="ieee")
        dp = tl.dot(values, above.T, input_precision="ieee")
        ds = (p * (dp - row_delta[None, :])).to(q_content.dtype)
        dk_content = tl.dot(ds, q_content, dk_content, input_precision="ieee")
        dk_rotary = tl.dot(ds, q_rotary, dk_rotary, input_precision="ieee")
    return dk_content, dk_rotary, dv
