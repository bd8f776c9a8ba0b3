"""Causal attention of multi-head latent attention in training (DeepSeek-V3 report, section 2.1.1).

    scores = (q_content . k_content + q_rotary . k_rotary) * scale       128 + 64 wide; heads share k_rotary
    out    = softmax(scores over the keys of the same document, up to the query's own) . v

The rotary key is never copied to the heads, and content keys and values stay side by side as the projection
of the latents leaves them. The softmax runs over tiles of keys, so no matrix of scores exists: maxima, sums
and the output are FP32, and only the log of each row's sum of exponentials is kept, from which the backward
pass makes the probabilities again (`kernels.attention.mla_attention_backward`).

Documents are given by `starts`, on the device: the position at which each position's document begins. Tiles
wholly before a query tile's documents are not read, and tiles wholly inside need no mask. On a GPU the
products of BF16 run on the tensor cores, with probabilities rounded to BF16, and those of FP32 in FP32 (no
TF32). Exponentials are the hardware's.

A NaN or a positive infinity among a row's scores makes the row NaN. A negative infinity is a weight of 0, as
in any softmax: the infinite key that it comes from then surfaces in the gradient of the query.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.attention import mla_attention_backward as backward
from kernels.attention.mla_tiles import (
    LOG2E,
    Config,
    check_widths,
    document_tiles,
    load_rows,
    position_of,
    runs_triton,
    score_chunks,
    store_rows,
    width_constants,
    widths,
)
from kernels.backend import jit, tl

# 128 queries share what is loaded of a key. Three stages give a tile of keys a whole step to arrive: with two
# it is asked for behind the softmax of the step before, and 128 keys a step leave room for two only. FP32
# products run on no tensor core, and need small tiles.
CONFIGS = {
    torch.bfloat16: Config(block_m=128, block_n=64, num_warps=8, num_stages=3),
    torch.float32: Config(block_m=32, block_n=16, num_warps=8, num_stages=1),
}
WIDEST = (128, 64, 128)  # N, R and V for which the tiles fit into shared memory, those of dq above all


def mla_attention(
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention [B, T, H, V] of q [B, T, H, N + R] over the keys and values of the same positions.

    key_value is [B, T, H, N + V]: the first N are a head's content key, the others its value. key_rotary is
    [B, T, R], one for all heads. The first N of `q` meet the content key, the last R the rotary key, and
    `scale` is the factor on scores. With `starts` (int32 [B, T], see `document_starts`) a query sees its own
    document only, without it everything before. Any of B, T and H may be 0.

    All are FP32 or BF16, of one type and on one device, and so are the output and the gradients; that of the
    rotary key is summed over heads in FP32. Results do not depend on the order of threads.

    On a GPU N, R and V are at most 128, 64 and 128, and the values of `starts` are not checked, since that
    would wait for the device.

    Raises:
        ValueError, TypeError: shapes, types, devices, `scale` or, on a CPU, `starts` do not fit.
        RuntimeError: the tensors are on a GPU that the kernels do not support.
    """
    _check(q, key_value, key_rotary, scale, starts)
    parts = (q.contiguous(), key_value.contiguous(), key_rotary.contiguous())
    return _MlaAttention.apply(*parts, scale, None if starts is None else starts.contiguous())


class _MlaAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        key_value: torch.Tensor,
        key_rotary: torch.Tensor,
        scale: float,
        starts: torch.Tensor | None,
    ) -> torch.Tensor:
        attention = attention_triton if runs_triton("mla_attention", q) else attention_reference
        out, lse = attention(q, key_value, key_rotary, scale, starts)
        ctx.save_for_backward(q, key_value, key_rotary, starts, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, key_value, key_rotary, starts, out, lse = ctx.saved_tensors
        triton = runs_triton("mla_attention", q)
        gradients = backward.gradients_triton if triton else backward.gradients_reference
        found = gradients(grad.contiguous(), q, key_value, key_rotary, out, lse, ctx.scale, starts)
        return *found, None, None


def attention_reference(
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The PyTorch reference, on any device, in FP32: the output and each row's log-sum-exp.

    lse [B, H, T] is to base 2: the log2 of the sum of the exponentials of a row's scores. Scores exist for a
    chunk of queries at a time.
    """
    n, _, v = widths(q, key_value, key_rotary)
    out = q.new_empty(*q.shape[:3], v)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    for rows, scores in score_chunks(q, key_value, key_rotary, scale, starts):
        lse[..., rows] = scores.logsumexp(-1) * LOG2E
        p = torch.exp2(scores * LOG2E - lse[..., rows, None])
        values = key_value[:, : rows.stop, :, n:].float()
        out[:, rows] = torch.einsum("bhml,blhv->bmhv", p, values).to(out.dtype)
    return out, lse


def attention_triton(
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel of `attention_reference`, over contiguous tensors."""
    batch, length, heads, _ = q.shape
    sizes = widths(q, key_value, key_rotary)
    check_widths("mla_attention", sizes, WIDEST)
    out = q.new_empty(batch, length, heads, sizes[2])
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if out.numel() > 0:
        config = CONFIGS[q.dtype]
        with torch.cuda.device_of(q):
            forward_kernel[(-(-length // config.block_m), heads, batch)](
                q, key_value, key_rotary, starts, out, lse, length, heads, scale,
                **width_constants(sizes), BLOCK_M=config.block_m, BLOCK_N=config.block_n, **config.options,
            )  # fmt: skip
    return out, lse


def _check(
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None,
) -> None:
    shapes = (
        f"q is {tuple(q.shape)}, key_value {tuple(key_value.shape)}, key_rotary {tuple(key_rotary.shape)}"
    )
    if (
        (q.dim(), key_value.dim(), key_rotary.dim()) != (4, 4, 3)
        or q.shape[:3] != key_value.shape[:3]
        or q.shape[:2] != key_rotary.shape[:2]
        or min(widths(q, key_value, key_rotary)) < 1
    ):
        raise ValueError(
            f"mla_attention: {shapes}; they must be [batch, positions, heads, N + R], "
            "[batch, positions, heads, N + V] and [batch, positions, R], with N, R and V of at least 1"
        )
    if q.dtype not in CONFIGS:
        raise TypeError(f"mla_attention: the type of q is {q.dtype}; use torch.float32 or torch.bfloat16")
    for name, tensor in (("key_value", key_value), ("key_rotary", key_rotary)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"mla_attention: {name} is {tensor.dtype} and q {q.dtype}; cast one of them")
        if tensor.device != q.device:
            raise ValueError(
                f"mla_attention: {name} is on {tensor.device} and q on {q.device}; move one of them"
            )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"mla_attention: scale is {scale}; it must be finite and above 0")
    if starts is None:
        return
    if starts.shape != q.shape[:2] or starts.dtype != torch.int32 or starts.device != q.device:
        raise ValueError(
            f"mla_attention: starts are {starts.dtype} {tuple(starts.shape)} on {starts.device}; they must "
            f"be torch.int32 {tuple(q.shape[:2])} on {q.device} (see document_starts)"
        )
    if starts.device.type == "cpu":
        positions = torch.arange(starts.shape[1], dtype=torch.int32)
        if ((starts < 0) | (starts > positions)).any() or (starts.diff(dim=1) < 0).any():
            raise ValueError(
                "mla_attention: starts must lie between 0 and their own position and never fall along a row; "
                "make them with document_starts"
            )


@jit
def forward_kernel(
    q, key_value, key_rotary, starts, out, lse, T, heads, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    N_PAD: tl.constexpr, R_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head over all keys that they see.

    Programs of one head follow each other, so that its keys stay in the L2 cache, and those that see most
    come first, so that short ones fill the end.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = tile * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    row = first + local
    # Rows past the end read the last one and are never stored: that way loads need no mask.
    row_in = tl.minimum(local, T - 1 - first)
    at = (batch * T + first) * heads + head
    q_content = load_rows(q + at * (N + R), row_in, heads * (N + R), N, N_PAD)
    q_rotary = load_rows(q + at * (N + R) + N, row_in, heads * (N + R), R, R_PAD)
    key_value += (batch * T * heads + head) * (N + V)
    key_rotary += batch * T * R

    # Keys from `low` to `whole` may be of an earlier document, those from `first` on later than a query.
    low, whole, start = 0, 0, None
    if starts is not None:
        start, low, whole = document_tiles(starts + batch * T, first, row_in, T, BLOCK_M, BLOCK_N)
    before = (whole - low) // BLOCK_N
    diagonal = tl.cdiv(tl.minimum(first + BLOCK_M, T) - first, BLOCK_N)

    total = tl.zeros((BLOCK_M, V_PAD), dtype=tl.float32)
    biggest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total, biggest, mass = attend_tiles(
        total, biggest, mass, q_content, q_rotary, key_value, key_rotary, row, start,
        low, before, first, before + diagonal, T, heads * (N + V), scale * 1.4426950408889634,
        N, R, V, N_PAD, R_PAD, V_PAD, BLOCK_N, True,
    )  # fmt: skip
    total, biggest, mass = attend_tiles(
        total, biggest, mass, q_content, q_rotary, key_value, key_rotary, row, start,
        whole, 0, whole, (first - whole) // BLOCK_N, T, heads * (N + V), scale * 1.4426950408889634,
        N, R, V, N_PAD, R_PAD, V_PAD, BLOCK_N, False,
    )  # fmt: skip
    store_rows(out + at * V, total / mass[:, None], local, row < T, heads * V, V, V_PAD)
    tl.store(lse + (batch * heads + head) * T + row, biggest + tl.log2(mass), mask=row < T)


@jit
def attend_tiles(
    total, biggest, mass, q_content, q_rotary, key_value, key_rotary, row, start,
    low, lead, then, count, T, stride, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    N_PAD: tl.constexpr, R_PAD: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add `count` tiles of keys to the weighted sum of values, its weights' sum and the biggest score.

    Scores count in powers of two: `scale` includes log2(e).
    """
    for step in tl.range(0, count):
        first = position_of(step, low, lead, then, BLOCK_N)
        local = tl.arange(0, BLOCK_N)
        if MASKED:
            local = tl.minimum(local, T - 1 - first)
        at = key_value + first.to(tl.int64) * stride
        content = load_rows(at, local, stride, N, N_PAD)
        rotary = load_rows(key_rotary + first.to(tl.int64) * R, local, R, R, R_PAD)
        scores = tl.dot(q_content, content.T, input_precision="ieee")
        scores = tl.dot(q_rotary, rotary.T, scores, input_precision="ieee")
        if MASKED:
            col = first + tl.arange(0, BLOCK_N)
            seen = col[None, :] <= row[:, None]
            if start is not None:
                seen = seen & (col[None, :] >= start[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        bigger = tl.maximum(biggest, tl.max(scores, axis=1) * scale)
        base = bigger
        if MASKED:
            # A row that has seen no key yet must not subtract minus infinity.
            base = tl.where(bigger == float("-inf"), 0.0, bigger)
        p = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(biggest - base)
        mass = mass * shrink + tl.sum(p, axis=1)
        values = load_rows(at + N, local, stride, V, V_PAD)
        total = tl.dot(p.to(values.dtype), values, total * shrink[:, None], input_precision="ieee")
        biggest = bigger
    return total, biggest, mass
