"""GEMMs over FP8 tokens grouped by expert (DeepSeek-V3 report, section 3.3): the three of an MoE layer.

    fprop, dgrad   out[rows of e] = a[rows of e] @ b[e].T                    `grouped_gemm`
    wgrad          out[e] += a[:, tokens of e] @ b[:, tokens of e].T         `grouped_gemm_k`

How tokens, experts and `offsets` fit together is said in `kernels.formats.grouped_quantize`. The host never
reads offsets on a GPU, so launch grids are the largest that any offsets could need. Sums are those of
`kernels.gemms.gemm`: 128 products on the tensor core, then promotion to FP32.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.grouped_quantize import QuantizedExperts, check_offsets, group_starts
from kernels.formats.quantize import TILE, TILES, Quantized, dequantize
from kernels.formats.square import experts_range
from kernels.gemms import hopper_gemm
from kernels.gemms.gemm_tiles import (
    BAND,
    LARGE,
    MEDIUM,
    SMALL,
    STEPS,
    TILE_CONFIGS,
    Config,
    b_pieces,
    choose,
    descriptor,
    empty_rows,
    fits_tma,
    out_pieces,
    output_tile,
    piece_columns,
    programs,
    scales_by_group,
    stored_tile,
    sum_groups,
    whole_groups,
)

# The launch shapes that `config_for` may take, and a benchmark can try. Finding the expert of a tile takes
# registers, and with a fourth step in flight LARGE has none left.
CONFIGS = (replace(LARGE, num_stages=3), MEDIUM, SMALL)


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
    a: Quantized,
    b: QuantizedExperts,
    offsets: torch.Tensor,
    out_dtype: torch.dtype = torch.float32,
    config: Config | None = None,
) -> torch.Tensor:
    """The Triton kernel: what `grouped_gemm` runs on a GPU, as `config` or `config_for` says."""
    _check(a, b, offsets, out_dtype)
    (tokens, k), (experts, n, _) = a.shape, b.shape
    device = a.codes.device
    if tokens == 0 or n == 0 or k == 0:
        return torch.zeros((tokens, n), dtype=out_dtype, device=device)
    out = empty_rows((tokens, n), out_dtype, device)
    b_codes = whole_groups(b.codes)
    if config is None and tokens > SMALL.block_m * experts and hopper_gemm.supported(device):
        hopper_gemm.launch(whole_groups(a.codes), a.scales, b_codes, b.scales, out, offsets)
        return out.contiguous()
    config = config or config_for(tokens, experts, n, out_dtype, device)
    # The rows of no expert count as one more; each expert can add at most one tile that is not full.
    most = (-(-tokens // config.block_m) + experts) * -(-n // config.block_n)
    with torch.cuda.device_of(out):
        grouped_gemm_kernel[(programs(config, most, device),)](
            descriptor(whole_groups(a.codes), [config.block_m, TILE]), a.scales,
            *b_pieces(b_codes.view(-1, b_codes.shape[2]), config), b.scales, offsets,
            *out_pieces(out, config), out,
            tokens, experts, n, a.scales.shape[1], out.stride(0),
            EXPERTS=experts_range(experts),
            BLOCK_M=config.block_m, WIDE=config.wide, NARROW=config.narrow, BAND=BAND,
            **config.options(out_dtype, device),
        )  # fmt: skip
    return out.contiguous()


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


def grouped_gemm_k_triton(
    a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor, config: Config | None = None
) -> None:
    """The Triton kernel: what `grouped_gemm_k` runs on a GPU, as `config` or `choose` says."""
    _check_k(a, b, offsets, out)
    if out.numel() == 0 or a.shape[1] == 0:
        return
    if fits_tma(out):
        _launch_k(a, b, offsets, out, config)
    else:
        wider = empty_rows(tuple(out.shape), out.dtype, out.device).copy_(out)
        _launch_k(a, b, offsets, wider, config)
        out.copy_(wider)


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


def config_for(tokens: int, experts: int, n: int, out_dtype: torch.dtype, device: torch.device) -> Config:
    """The launch shape of `grouped_gemm`: SMALL up to a mean of 64 tokens an expert, the host knows no other.

    Above, that of `choose` for one matrix of all tokens.
    """
    if tokens <= SMALL.block_m * experts:
        return SMALL
    return choose(CONFIGS, tokens, n, out_dtype, device)


def _launch_k(
    a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor, config: Config | None
) -> None:
    (experts, n, k), device = out.shape, out.device
    config = config or choose(TILE_CONFIGS, n, experts * k, out.dtype, device)
    b_scales = scales_by_group(b.scales)
    with torch.cuda.device_of(out):
        grouped_gemm_k_kernel[(programs(config, experts * config.tiles(n, k), device),)](
            descriptor(whole_groups(a.codes), [config.block_m, TILE]), a.scales,
            b_pieces(whole_groups(b.codes), config)[0], b_scales, offsets,
            out_pieces(out, config)[0], out,
            experts, n, k, a.scales.shape[1], b_scales.shape[1], out.stride(0), out.stride(1),
            EXPERTS=experts_range(experts), BLOCK_M=config.block_m, WIDE=config.wide, BAND=BAND,
            **config.options(out.dtype, device),
        )  # fmt: skip


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


@jit(do_not_specialize=STEPS)
def grouped_gemm_kernel(
    a, a_scales, wide_b, narrow_b, b_scales, offsets, wide_out, narrow_out, out,
    TOKENS, NUM_EXPERTS, N, GROUPS, OUT_STRIDE,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Each program walks over the full output tiles of all experts, their last ones, then rows of no expert.

    a, b (the experts one below the other) and the output are TMA descriptors, `out` is the output's address.
    K is 128 * GROUPS. Only the full tiles are flattened into one loop with that over K (`gemm.py`): the
    compiler allows no branch there, and a last tile must not be stored into the rows of the next expert.
    """
    tiles_n = tl.cdiv(N, WIDE + NARROW)
    tokens = expert_tokens(offsets, NUM_EXPERTS, EXPERTS)
    # Full tiles, and rows left over by them, of all experts up to and including each one.
    full_ends = tl.cumsum(tokens // BLOCK_M, 0)
    left_ends = tl.cumsum(tokens % BLOCK_M, 0)
    tiles_m = tl.max(full_ends, 0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = output_tile(tile, tiles_m, tiles_n, BAND)
        expert = tl.sum((full_ends <= tile_m).to(tl.int32), 0)  # the first that ends after the tile
        row = tile_m * BLOCK_M + tl.max(tl.where(full_ends <= tile_m, left_ends, 0), 0)
        wide, narrow = piece_columns(tile_n, WIDE, NARROW)
        wide_total, narrow_total = expert_sums(
            a, a_scales, wide_b, narrow_b, b_scales, expert, row, wide, narrow, TOKENS, N, GROUPS,
            BLOCK_M, WIDE, NARROW,
        )  # fmt: skip
        wide_out.store([row, wide], wide_total.to(out.dtype.element_ty))
        if NARROW > 0:
            narrow_out.store([row, narrow], narrow_total.to(out.dtype.element_ty))

    # The program whose turn it is goes on, with wide pieces alone.
    count = tl.num_programs(0)
    turn = (tl.program_id(0) + count - tiles_m * tiles_n % count) % count
    left_over = expert_tokens(offsets, NUM_EXPERTS, EXPERTS) % BLOCK_M > 0
    last_ends = tl.cumsum(left_over.to(tl.int32), 0)
    tiles_m = tl.max(last_ends, 0)
    tiles_n = tl.cdiv(N, WIDE)
    # Addresses hoisted out of this loop would be spilled.
    for tile in tl.range(turn, tiles_m * tiles_n, count, disable_licm=True):
        tile_m, tile_n = output_tile(tile, tiles_m, tiles_n, BAND)
        expert = tl.sum((last_ends <= tile_m).to(tl.int32), 0)
        begin = tl.load(offsets + expert).to(tl.int32)
        # Offsets are not checked on a GPU: those past the last token must not lead outside of the operands.
        end = min(tl.load(offsets + expert + 1).to(tl.int32), TOKENS)
        row = end - (end - begin) % BLOCK_M
        col = tile_n * WIDE
        total, _ = expert_sums(
            a, a_scales, wide_b, wide_b, b_scales, expert, row, col, col, TOKENS, N, GROUPS, BLOCK_M, WIDE, 0
        )
        at, inside = stored_tile(out, row, col, end, N, OUT_STRIDE, BLOCK_M, WIDE)
        tl.store(at, total.to(out.dtype.element_ty), mask=inside)

    used = tl.load(offsets + NUM_EXPERTS).to(tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(TOKENS - used, BLOCK_M) * tiles_n, count):
        row = used + tile // tiles_n * BLOCK_M
        at, inside = stored_tile(out, row, tile % tiles_n * WIDE, TOKENS, N, OUT_STRIDE, BLOCK_M, WIDE)
        tl.store(at, tl.zeros((BLOCK_M, WIDE), dtype=out.dtype.element_ty), mask=inside)


@jit
def expert_tokens(offsets, NUM_EXPERTS, EXPERTS: tl.constexpr):
    """Tokens of each expert, and zeros up to a power of two."""
    index = tl.arange(0, EXPERTS)
    lower = tl.load(offsets + index, mask=index < NUM_EXPERTS, other=0)
    return (tl.load(offsets + index + 1, mask=index < NUM_EXPERTS, other=0) - lower).to(tl.int32)


@jit
def expert_sums(
    a, a_scales, wide_b, narrow_b, b_scales, expert, row, wide, narrow, TOKENS, N, GROUPS,
    BLOCK_M: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Sums of the two pieces of a tile of one expert, from row `row` of all tokens on."""
    rows = row + tl.arange(0, BLOCK_M)
    a_scale_at = a_scales + tl.where(rows < TOKENS, rows, 0) * GROUPS
    last = (N - 1) // 128
    expert_scales = b_scales + expert * (last + 1) * GROUPS
    return sum_groups(
        a, wide_b, narrow_b, a_scale_at, expert_scales + min(wide // 128, last) * GROUPS,
        expert_scales + min(narrow // 128, last) * GROUPS, row, expert * N + wide, expert * N + narrow,
        0, GROUPS, 1, False, BLOCK_M, WIDE, NARROW,
    )  # fmt: skip


@jit(do_not_specialize=STEPS)
def grouped_gemm_k_kernel(
    a, a_scales, b, b_scales, offsets, wide_out, out,
    NUM_EXPERTS, N, K, GROUPS, B_SCALE_STRIDE, EXPERT_STRIDE, OUT_STRIDE,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Each program walks over the BLOCK_M x WIDE tiles of all experts' [N, K]. A row has 128 * GROUPS codes.

    a, b and `wide_out` are TMA descriptors, `out` is the output's address.
    """
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(K, WIDE)
    index = tl.arange(0, EXPERTS)
    filled = tl.cdiv(expert_tokens(offsets, NUM_EXPERTS, EXPERTS), 128)
    for tile in range(tl.program_id(0), NUM_EXPERTS * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_m * tiles_n)
        tile_m, tile_n = output_tile(tile % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
        first = tl.sum(tl.where(index < expert, filled, 0), 0)
        groups = min(tl.sum(tl.where(index == expert, filled, 0), 0), GROUPS - first)
        row = tile_m * BLOCK_M
        col = tile_n * WIDE
        rows = row + tl.arange(0, BLOCK_M)
        a_scale_at = a_scales + tl.where(rows < N, rows, 0) * GROUPS
        b_scale_at = b_scales + col + tl.arange(0, WIDE)
        total, _ = sum_groups(
            a, b, b, a_scale_at, b_scale_at, b_scale_at, row, col, col, first, groups,
            B_SCALE_STRIDE, True, BLOCK_M, WIDE, 0,
        )  # fmt: skip
        if groups > 0:
            corner = out + expert.to(tl.int64) * EXPERT_STRIDE
            at, inside = stored_tile(corner, row, col, N, K, OUT_STRIDE, BLOCK_M, WIDE)
            total += tl.load(at, mask=inside, other=0.0)
            wide_out.store([expert, row, col], total.reshape(1, BLOCK_M, WIDE))
