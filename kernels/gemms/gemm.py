"""GEMM over FP8 matrices with fine-grained scales (DeepSeek-V3 report, section 3.3.2): out = a @ b.T.

Hopper's FP8 tensor cores align 32 products at a time and keep 13 fraction bits (ISCA 2025 paper, section
3.1.1), too few for a long sum. So products are summed in groups of 128 along K (four wgmma instructions), and
each group is promoted: multiplied by its scales and added to an FP32 accumulator on the CUDA cores. Within a
group the scales are constant, so taking them out of the sum changes nothing but FP32 rounding.

    operand   blocks                      used for
    a         1x128                       activations, output gradients
    b         128x128                     weights (fprop; transposed, dgrad)
    b         1x128                       transposed activations (wgrad)

How the kernel is cut into tiles is said in `kernels.gemms.gemm_tiles`.
"""

from __future__ import annotations

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.quantize import TILE, TILES, Quantized, dequantize
from kernels.gemms import hopper_gemm
from kernels.gemms.gemm_tiles import (
    BAND,
    BLOCK_CONFIGS,
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


def gemm(a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """a [M, K] in 1x128 tiles times b [N, K] in 1x128 tiles or 128x128 blocks, transposed: [M, N].

    Sums are FP32 whatever the output type (FP32 or BF16). M, N and K are free; any of them may be 0. On a GPU
    a K that is no multiple of 128 costs a padded copy of both operands' codes, and output rows that are no
    multiple of 16 bytes cost a copy of the output.

    Raises:
        ValueError, TypeError: shapes, blocks, devices or the output type do not fit.
        RuntimeError: the operands are on a GPU without FP8 support.
    """
    return gemm_triton(a, b, out_dtype) if runs_triton(a.codes) else gemm_reference(a, b, out_dtype)


def gemm_add(a: Quantized, b: Quantized, out: torch.Tensor) -> None:
    """out += a @ b.T for an FP32 matrix `out` [M, N]: wgrad, into the buffer where gradients are summed.

    The sum of `gemm` is added once, as it leaves the kernel; K = 0 leaves `out` untouched.

    Raises:
        ValueError, TypeError: shapes, blocks, devices or `out` do not fit.
        RuntimeError: the operands are on a GPU without FP8 support.
    """
    if runs_triton(a.codes):
        gemm_add_triton(a, b, out)
    else:
        gemm_add_reference(a, b, out)


def gemm_triton(
    a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32, config: Config | None = None
) -> torch.Tensor:
    """The Triton kernel: what `gemm` runs on a GPU, in the launch shape `config` or that of `choose`."""
    _check(a, b)
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"gemm: out_dtype is {out_dtype}; use torch.float32 or torch.bfloat16")
    (m, k), n = a.shape, b.shape[0]
    if m == 0 or n == 0 or k == 0:
        return torch.zeros((m, n), dtype=out_dtype, device=a.codes.device)
    out = empty_rows((m, n), out_dtype, a.codes.device)
    _launch(a, b, out, config, add=False)
    return out.contiguous()


def gemm_add_triton(a: Quantized, b: Quantized, out: torch.Tensor, config: Config | None = None) -> None:
    """The Triton kernel: what `gemm_add` runs on a GPU, in the launch shape `config` or that of `choose`."""
    _check(a, b)
    _check_out(a, b, out)
    if out.numel() == 0 or a.shape[1] == 0:
        return
    if fits_tma(out):
        _launch(a, b, out, config, add=True)
    else:
        wider = empty_rows(tuple(out.shape), out.dtype, out.device).copy_(out)
        _launch(a, b, wider, config, add=True)
        out.copy_(wider)


def gemm_reference(a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The PyTorch reference, and what runs on a CPU: dequantise, then FP32 products summed 128 at a time.

    Each group of 128 is summed and then added to the FP32 accumulator, in the kernel's order over groups. The
    limited precision of the tensor core inside a group is not imitated.
    """
    _check(a, b)
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"gemm: out_dtype is {out_dtype}; use torch.float32 or torch.bfloat16")
    a_values, b_values = dequantize(a), dequantize(b)
    out = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.codes.device)
    for start in range(0, a.shape[1], TILE):
        out.addmm_(a_values[:, start : start + TILE], b_values[:, start : start + TILE].t())
    return out.to(out_dtype)


def gemm_add_reference(a: Quantized, b: Quantized, out: torch.Tensor) -> None:
    """The PyTorch reference, and what runs on a CPU: a sum from zero, added once, as in the kernel."""
    _check(a, b)
    _check_out(a, b, out)
    if a.shape[1] > 0:
        out += gemm_reference(a, b)


def configs_for(b_block: tuple[int, int], *, add: bool = False) -> tuple[Config, ...]:
    """The launch shapes that `choose` may take, and a benchmark can try, for b in blocks of `b_block`."""
    # To add, a thread reads the output into registers, which LARGE has none left for.
    return TILE_CONFIGS if add or b_block == TILES else BLOCK_CONFIGS


def _launch(a: Quantized, b: Quantized, out: torch.Tensor, config: Config | None, *, add: bool) -> None:
    (m, n), device = out.shape, out.device
    tiles = b.block == TILES
    if config is None and not (tiles or add) and m > SMALL.block_m and hopper_gemm.supported(device):
        hopper_gemm.launch(whole_groups(a.codes), a.scales, whole_groups(b.codes), b.scales, out)
        return
    config = config or choose(configs_for(b.block, add=add), m, n, out.dtype, device)
    b_scales = scales_by_group(b.scales) if tiles else b.scales
    with torch.cuda.device_of(out):
        gemm_kernel[(programs(config, config.tiles(m, n), device),)](
            descriptor(whole_groups(a.codes), [config.block_m, TILE]), a.scales,
            *b_pieces(whole_groups(b.codes), config), b_scales,
            *out_pieces(out, config), out if add else None,
            m, n, a.scales.shape[1], b_scales.shape[1] if tiles else 1, out.stride(0),
            B_TILES=tiles, ADD=add, FLATTEN=not (tiles or add),
            BLOCK_M=config.block_m, WIDE=config.wide, NARROW=config.narrow, BAND=BAND,
            **config.options(out.dtype, device),
        )  # fmt: skip


def _check(a: Quantized, b: Quantized) -> None:
    if a.block != TILES:
        raise ValueError(f"gemm: a is quantised in blocks of {a.block}; quantise it with quantize_tiles")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"gemm: a is {tuple(a.shape)} and b {tuple(b.shape)}; their last dimensions (the sum) must agree"
        )
    if a.codes.device != b.codes.device:
        raise ValueError(f"gemm: a is on {a.codes.device} and b on {b.codes.device}; move one of them")


def _check_out(a: Quantized, b: Quantized, out: torch.Tensor) -> None:
    if out.dtype != torch.float32:
        raise TypeError(f"gemm_add: out is {out.dtype}; sums are kept in torch.float32")
    expected = (a.shape[0], b.shape[0])
    if tuple(out.shape) != expected or not out.is_contiguous():
        raise ValueError(
            f"gemm_add: out has shape {tuple(out.shape)}; a {tuple(a.shape)} and b {tuple(b.shape)} "
            f"need a contiguous {expected}"
        )
    if out.device != a.codes.device:
        raise ValueError(f"gemm_add: out is on {out.device} and a on {a.codes.device}; move one of them")


@jit(do_not_specialize=STEPS)
def gemm_kernel(
    a, a_scales, wide_b, narrow_b, b_scales, wide_out, narrow_out, out,
    M, N, GROUPS, B_SCALE_STRIDE, OUT_STRIDE,
    B_TILES: tl.constexpr, ADD: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Each program walks over output tiles of BLOCK_M x (WIDE + NARROW). K is 128 * GROUPS.

    a, b and the output are TMA descriptors: what lies outside a matrix reads as zero and is not written.
    `out` is the output's address, given only if it is added to.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, WIDE + NARROW)
    # Flattened into one loop with that over K, loads run on from a tile into the next. With 1x128 scales of b
    # or an output to read, there are no registers left for that.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = output_tile(tile, tiles_m, tiles_n, BAND)
        row = tile_m * BLOCK_M
        wide, narrow = piece_columns(tile_n, WIDE, NARROW)
        rows = row + tl.arange(0, BLOCK_M)
        # 32 bits reach every scale (2**31 of them would go with 256 GiB of codes) and save registers.
        a_scale_at = a_scales + tl.where(rows < M, rows, 0) * GROUPS
        if B_TILES:
            wide_scale_at = b_scales + wide + tl.arange(0, WIDE)
            narrow_scale_at = wide_scale_at
        else:
            last = (N - 1) // 128
            wide_scale_at = b_scales + min(wide // 128, last) * GROUPS
            narrow_scale_at = b_scales + min(narrow // 128, last) * GROUPS
        wide_total, narrow_total = sum_groups(
            a, wide_b, narrow_b, a_scale_at, wide_scale_at, narrow_scale_at, row, wide, narrow, 0, GROUPS,
            B_SCALE_STRIDE, B_TILES, BLOCK_M, WIDE, NARROW,
        )  # fmt: skip
        if ADD:
            tl.static_assert(NARROW == 0, "only the wide piece is added")
            at, inside = stored_tile(out, row, wide, M, N, OUT_STRIDE, BLOCK_M, WIDE)
            wide_total += tl.load(at, mask=inside, other=0.0)
        wide_out.store([row, wide], wide_total.to(wide_out.dtype))
        if NARROW > 0:
            narrow_out.store([row, narrow], narrow_total.to(narrow_out.dtype))
