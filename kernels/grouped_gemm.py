"""GEMMs over FP8 tokens grouped by expert (DeepSeek-V3 report, section 3.3): the three of an MoE layer.

    fprop, dgrad   out[rows of e] = a[rows of e] @ b[e].T                    `grouped_gemm`
    wgrad          out[e] += a[:, tokens of e] @ b[:, tokens of e].T         `grouped_gemm_k`

How tokens, experts and `offsets` fit together is said in `kernels.grouped_quantize`. The host never reads
offsets on a GPU, so launch grids are the largest that any offsets could need. Sums are those of
`kernels.gemm`: 128 products on the tensor core, then promotion to FP32.
"""

from __future__ import annotations

import itertools

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.gemm import BAND, LARGE, SMALL, Config, output_tile, whole_groups
from kernels.grouped_quantize import QuantizedExperts, check_offsets, group_starts
from kernels.quantize import TILE, TILES, Quantized, dequantize

SUMS = (
    SMALL  # launch shape of `grouped_gemm_k`: as in `gemm`, larger tiles spill where both have 1x128 scales
)


def grouped_gemm(
    a: Quantized, b: QuantizedExperts, offsets: torch.Tensor, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows of a [tokens, K] (1x128 tiles) times the transposed weight [N, K] of their expert: [tokens, N].

    Sums are FP32 whatever the output type (FP32 or BF16). Experts may have any number of tokens, also none.
    On a GPU a K that is no multiple of 128 costs a padded copy of both operands' codes.

    Raises:
        ValueError, TypeError: shapes, blocks, devices, offsets or the output type do not fit.
        RuntimeError: the operands are on a GPU without FP8 support.
    """
    if runs_triton(a.codes):
        return grouped_gemm_triton(a, b, offsets, out_dtype)
    return grouped_gemm_reference(a, b, offsets, out_dtype)


def grouped_gemm_triton(
    a: Quantized, b: QuantizedExperts, offsets: torch.Tensor, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The Triton kernel: what `grouped_gemm` runs on a GPU."""
    _check(a, b, offsets, out_dtype)
    (tokens, k), (experts, n, _) = a.shape, b.shape
    if tokens == 0 or n == 0 or k == 0:
        return torch.zeros((tokens, n), dtype=out_dtype, device=a.codes.device)
    out = torch.empty((tokens, n), dtype=out_dtype, device=a.codes.device)
    config = config_for(tokens, experts)
    # The rows of no expert count as one more; each expert can add at most one tile that is not full.
    grid = ((-(-tokens // config.block_m) + experts) * -(-n // config.block_n),)
    with torch.cuda.device_of(a.codes):
        grouped_gemm_kernel[grid](
            whole_groups(a.codes), a.scales, whole_groups(b.codes), b.scales, offsets, out,
            tokens, experts, n, a.scales.shape[1],
            EXPERTS=experts_range(experts), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BAND=BAND,
            **config.options,
        )  # fmt: skip
    return out


def grouped_gemm_reference(
    a: Quantized, b: QuantizedExperts, offsets: torch.Tensor, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The PyTorch reference, and what runs on a CPU: expert by expert, FP32 products summed 128 at a time."""
    _check(a, b, offsets, out_dtype)
    values = dequantize(a)
    out = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.codes.device)
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            _add_groups(out[begin:end], values[begin:end], dequantize(b.expert(expert)))
    return out.to(out_dtype)


def grouped_gemm_k(a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """Add to each out[e] (FP32, [experts, N, K]) a @ b.T over the columns of expert e.

    a [N, columns] and b [K, columns] are made by `quantize_tokens` with the same `offsets`. The sum of an
    expert starts from zero and is added to `out` once; an expert without tokens leaves its part untouched.

    Raises:
        ValueError, TypeError: shapes, blocks, devices, offsets or `out` do not fit.
        RuntimeError: the operands are on a GPU without FP8 support.
    """
    if runs_triton(a.codes):
        grouped_gemm_k_triton(a, b, offsets, out)
    else:
        grouped_gemm_k_reference(a, b, offsets, out)


def grouped_gemm_k_triton(a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """The Triton kernel: what `grouped_gemm_k` runs on a GPU."""
    _check_k(a, b, offsets, out)
    experts, n, k = out.shape
    if out.numel() == 0 or a.shape[1] == 0:
        return
    config = SUMS
    grid = (-(-n // config.block_m) * -(-k // config.block_n), experts)
    with torch.cuda.device_of(a.codes):
        grouped_gemm_k_kernel[grid](
            a.codes, a.scales, b.codes, b.scales, offsets, out, n, k, a.scales.shape[1],
            EXPERTS=experts_range(experts), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BAND=BAND,
            **config.options,
        )  # fmt: skip


def grouped_gemm_k_reference(a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """The PyTorch reference, and what runs on a CPU: whole groups of an expert, as the kernel takes them."""
    _check_k(a, b, offsets, out)
    a_values, b_values = dequantize(a), dequantize(b)
    starts = (group_starts(offsets) * TILE).tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(starts)):
        if begin < end:
            total = torch.zeros_like(out[expert])
            _add_groups(total, a_values[:, begin:end], b_values[:, begin:end])
            out[expert] += total


def config_for(tokens: int, experts: int) -> Config:
    """The launch shape of `grouped_gemm`, by the mean number of tokens: the host knows no other."""
    return LARGE if tokens > SMALL.block_m * experts else SMALL


def experts_range(experts: int) -> int:
    """Length of the vector, a power of two from 32 on, in which a kernel reads the offsets of all experts."""
    return 1 << max(experts - 1, 31).bit_length()


def _add_groups(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b.T in FP32, 128 columns at a time."""
    for start in range(0, a.shape[1], TILE):
        total.addmm_(a[:, start : start + TILE], b[:, start : start + TILE].t())


def _check(a: Quantized, b: QuantizedExperts, offsets: torch.Tensor, out_dtype: torch.dtype) -> None:
    if a.block != TILES:
        raise ValueError(
            f"grouped_gemm: a is quantised in blocks of {a.block}; quantise it with quantize_tiles"
        )
    if a.shape[1] != b.shape[2]:
        raise ValueError(
            f"grouped_gemm: a is {tuple(a.shape)} and b {tuple(b.shape)}; "
            "their last dimensions (the sum) must agree"
        )
    if a.codes.device != b.codes.device:
        raise ValueError(
            f"grouped_gemm: a is on {a.codes.device} and b on {b.codes.device}; move one of them"
        )
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"grouped_gemm: out_dtype is {out_dtype}; use torch.float32 or torch.bfloat16")
    check_offsets("grouped_gemm", offsets, a.shape[0], a.codes.device)
    if offsets.numel() != b.shape[0] + 1:
        raise ValueError(
            f"grouped_gemm: there are {offsets.numel()} offsets and {b.shape[0]} experts; "
            "pass one offset more than experts"
        )


def _check_k(a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor) -> None:
    if a.block != TILES or b.block != TILES or a.shape[1] != b.shape[1] or a.shape[1] % TILE:
        raise ValueError(
            f"grouped_gemm_k: a is {tuple(a.shape)} in blocks of {a.block} and b {tuple(b.shape)} in blocks "
            f"of {b.block}; make both with quantize_tokens from the same offsets"
        )
    if out.dtype != torch.float32:
        raise TypeError(f"grouped_gemm_k: out is {out.dtype}; sums are kept in torch.float32")
    expected = (offsets.numel() - 1, a.shape[0], b.shape[0])
    if tuple(out.shape) != expected or not out.is_contiguous():
        raise ValueError(
            f"grouped_gemm_k: out has shape {tuple(out.shape)}; {offsets.numel()} offsets, a "
            f"{tuple(a.shape)} and b {tuple(b.shape)} need a contiguous {expected}"
        )
    if not a.codes.device == b.codes.device == out.device:
        raise ValueError(
            f"grouped_gemm_k: a is on {a.codes.device}, b on {b.codes.device} and out on {out.device}"
        )
    check_offsets("grouped_gemm_k", offsets, a.shape[1], out.device)
    if offsets.device.type == "cpu":
        groups = int(group_starts(offsets)[-1])
        if groups > a.scales.shape[1]:
            raise ValueError(
                f"grouped_gemm_k: offsets {offsets.tolist()} need {groups} groups of {TILE} columns and a is "
                f"{tuple(a.shape)}; make both operands with quantize_tokens from the same offsets"
            )


@jit
def grouped_gemm_kernel(
    a, a_scales, b, b_scales, offsets, out, TOKENS, NUM_EXPERTS, N, GROUPS,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: one BLOCK_M x BLOCK_N tile of one expert's output. K is 128 * GROUPS."""
    tiles_m = tl.cdiv(TOKENS, BLOCK_M) + NUM_EXPERTS
    tile, tile_n = output_tile(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), BAND)
    # Which expert's tile is it? The first whose tiles, and those of all before, are more than `tile`.
    index = tl.arange(0, EXPERTS)
    lower = tl.load(offsets + index, mask=index < NUM_EXPERTS, other=0).to(tl.int32)
    upper = tl.load(offsets + index + 1, mask=index < NUM_EXPERTS, other=0).to(tl.int32)
    tiles = tl.cdiv(upper - lower, BLOCK_M)
    before = (tl.cumsum(tiles, 0) <= tile) & (index < NUM_EXPERTS)
    expert = tl.sum(before.to(tl.int32), axis=0)
    tile_m = tile - tl.sum(tl.where(before, tiles, 0), axis=0)
    # Rows of no expert form one more group, whose sum has no terms: its output is zero.
    begin = tl.load(offsets + expert).to(tl.int32)
    end = tl.load(offsets + expert + 1, mask=expert < NUM_EXPERTS, other=TOKENS).to(tl.int32)
    groups = tl.where(expert < NUM_EXPERTS, GROUPS, 0)
    expert = tl.minimum(expert, NUM_EXPERTS - 1).to(tl.int64)

    row = begin + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the edge read row 0 and are never stored: that way the loads need no mask.
    row_in = tl.where(row < end, row, 0)
    col_in = tl.where(col < N, col, 0)
    inner = tl.arange(0, 128)
    a_at = a + row_in.to(tl.int64)[:, None] * (GROUPS * 128) + inner[None, :]
    b_at = b + expert * N * (GROUPS * 128) + col_in.to(tl.int64)[None, :] * (GROUPS * 128) + inner[:, None]
    a_scale_at = row_in * GROUPS
    b_scales += (expert * tl.cdiv(N, 128) + tile_n * BLOCK_N // 128) * GROUPS

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, groups):
        scale = tl.load(a_scales + a_scale_at + group) * tl.load(b_scales + group)
        # A dot that starts from zero, then a separate addition: this is the promotion to FP32.
        total += tl.dot(tl.load(a_at), tl.load(b_at)) * scale[:, None]
        a_at += 128
        b_at += 128

    inside = (row < end)[:, None] & (col < N)[None, :]
    corner = out + (begin + tile_m * BLOCK_M).to(tl.int64) * N + tile_n * BLOCK_N
    offset = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(corner + offset, total.to(out.dtype.element_ty), mask=inside)


@jit
def grouped_gemm_k_kernel(
    a, a_scales, b, b_scales, offsets, out, N, K, GROUPS,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: one BLOCK_M x BLOCK_N tile of one expert's [N, K]. A row has 128 * GROUPS codes."""
    tile_m, tile_n = output_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), BAND)
    expert = tl.program_id(1)
    index = tl.arange(0, EXPERTS)
    lower = tl.load(offsets + index, mask=index <= expert, other=0).to(tl.int32)
    upper = tl.load(offsets + index + 1, mask=index <= expert, other=0).to(tl.int32)
    filled = tl.cdiv(upper - lower, 128)
    first = tl.sum(tl.where(index < expert, filled, 0), axis=0)
    groups = tl.sum(tl.where(index == expert, filled, 0), axis=0)

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the edge read row 0 and are never stored: that way the loads need no mask.
    row_in = tl.where(row < N, row, 0)
    col_in = tl.where(col < K, col, 0)
    inner = tl.arange(0, 128)
    start = first.to(tl.int64) * 128
    a_at = a + start + row_in.to(tl.int64)[:, None] * (GROUPS * 128) + inner[None, :]
    b_at = b + start + col_in.to(tl.int64)[None, :] * (GROUPS * 128) + inner[:, None]
    a_scale_at = row_in * GROUPS + first
    b_scale_at = col_in * GROUPS + first

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, groups):
        a_scale = tl.load(a_scales + a_scale_at + group)
        b_scale = tl.load(b_scales + b_scale_at + group)
        total += tl.dot(tl.load(a_at), tl.load(b_at)) * a_scale[:, None] * b_scale[None, :]
        a_at += 128
        b_at += 128

    inside = (row < N)[:, None] & (col < K)[None, :] & (groups > 0)
    corner = out + (expert.to(tl.int64) * N + tile_m * BLOCK_M) * K + tile_n * BLOCK_N
    at = corner + tl.arange(0, BLOCK_M)[:, None] * K + tl.arange(0, BLOCK_N)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
