"""GEMM over FP8 matrices with fine-grained scales (DeepSeek-V3 report, section 3.3.2): out = a @ b.T.

Hopper's FP8 tensor cores align 32 products at a time and keep 13 fraction bits (ISCA 2025 paper, section
3.1.1), too few for a long sum. So products are summed in groups of 128 along K (four wgmma instructions), and
each group is promoted: multiplied by its scales and added to an FP32 accumulator on the CUDA cores. Within a
group the scales are constant, so taking them out of the sum changes nothing but FP32 rounding.

    operand   blocks                      used for
    a         1x128                       activations, output gradients
    b         128x128                     weights (fprop; transposed, dgrad)
    b         1x128                       transposed activations (wgrad)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.quantize import BLOCKS, TILE, TILES, Quantized, dequantize

BAND = 8  # rows of output tiles walked together, so that their operands stay in the L2 cache


@dataclass(frozen=True)
class Config:
    """Launch shape of the kernel: one output tile of block_m x block_n a program, K in steps of 128."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options. Fusion makes scaling and adding a group one instruction."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# block_n must divide 128, so that a program meets one weight scale a step. 128x128 spills with 4 warps, and
# with 8 where b has 1x128 tiles (a thread then holds 32 of their scales). SMALL leaves room for two programs
# on a multiprocessor.
SMALL = Config(block_m=64, block_n=128, num_warps=4, num_stages=4)
LARGE = Config(block_m=128, block_n=128, num_warps=8, num_stages=4)


def gemm(a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """a [M, K] in 1x128 tiles times b [N, K] in 1x128 tiles or 128x128 blocks, transposed: [M, N].

    Sums are FP32 whatever the output type (FP32 or BF16). M, N and K are free; any of them may be 0. On a GPU
    a K that is no multiple of 128 costs a padded copy of both operands' codes.

    Raises:
        ValueError, TypeError: shapes, blocks, devices or the output type do not fit.
        RuntimeError: the operands are on a GPU without FP8 support.
    """
    return gemm_triton(a, b, out_dtype) if runs_triton(a.codes) else gemm_reference(a, b, out_dtype)


def gemm_triton(a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The Triton kernel: what `gemm` runs on a GPU."""
    _check(a, b, out_dtype)
    (m, k), n = a.shape, b.shape[0]
    if m == 0 or n == 0 or k == 0:
        return torch.zeros((m, n), dtype=out_dtype, device=a.codes.device)
    out = torch.empty((m, n), dtype=out_dtype, device=a.codes.device)
    config = config_for(m, b.block)
    grid = (-(-m // config.block_m) * -(-n // config.block_n),)
    with torch.cuda.device_of(a.codes):
        gemm_kernel[grid](
            whole_groups(a.codes), a.scales, whole_groups(b.codes), b.scales, out, m, n, a.scales.shape[1],
            B_TILES=b.block == TILES, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BAND=BAND,
            **config.options,
        )  # fmt: skip
    return out


def gemm_reference(a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The PyTorch reference, and what runs on a CPU: dequantise, then FP32 products summed 128 at a time.

    Each group of 128 is summed and then added to the FP32 accumulator, in the kernel's order over groups. The
    limited precision of the tensor core inside a group is not imitated.
    """
    _check(a, b, out_dtype)
    a_values, b_values = dequantize(a), dequantize(b)
    out = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.codes.device)
    for start in range(0, a.shape[1], TILE):
        out.addmm_(a_values[:, start : start + TILE], b_values[:, start : start + TILE].t())
    return out.to(out_dtype)


def config_for(m: int, b_block: tuple[int, int]) -> Config:
    """The launch shape for m output rows and a second operand in blocks of `b_block`."""
    return LARGE if m > SMALL.block_m and b_block == BLOCKS else SMALL


def whole_groups(codes: torch.Tensor) -> torch.Tensor:
    """The codes [..., K] with zero columns added up to a multiple of 128.

    Masking K in the kernel instead gives up wide loads, since the rows of a ragged K start at odd addresses,
    and the compiled kernel then spills registers.
    """
    missing = -codes.shape[-1] % TILE
    if missing == 0:
        return codes
    return torch.nn.functional.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype)


def _check(a: Quantized, b: Quantized, out_dtype: torch.dtype) -> None:
    if a.block != TILES:
        raise ValueError(f"gemm: a is quantised in blocks of {a.block}; quantise it with quantize_tiles")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"gemm: a is {tuple(a.shape)} and b {tuple(b.shape)}; their last dimensions (the sum) must agree"
        )
    if a.codes.device != b.codes.device:
        raise ValueError(f"gemm: a is on {a.codes.device} and b on {b.codes.device}; move one of them")
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"gemm: out_dtype is {out_dtype}; use torch.float32 or torch.bfloat16")


@jit
def output_tile(program, tiles_m, tiles_n, BAND: tl.constexpr):
    """Row and column of the output tile of `program`: bands of BAND rows of tiles, each walked by columns."""
    band = program // (BAND * tiles_n)
    band_rows = min(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + (program % (BAND * tiles_n)) % band_rows
    tile_n = (program % (BAND * tiles_n)) // band_rows
    return tile_m, tile_n


@jit
def gemm_kernel(
    a, a_scales, b, b_scales, out, M, N, GROUPS,
    B_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: one BLOCK_M x BLOCK_N tile of the output. K is 128 * GROUPS."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = output_tile(tl.program_id(0), tiles_m, tiles_n, BAND)

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the edge read row 0 and are never stored: that way the loads need no mask.
    row_in = tl.where(row < M, row, 0)
    col_in = tl.where(col < N, col, 0)
    inner = tl.arange(0, 128)
    a_at = a + row_in.to(tl.int64)[:, None] * (GROUPS * 128) + inner[None, :]
    b_at = b + col_in.to(tl.int64)[None, :] * (GROUPS * 128) + inner[:, None]
    # 32 bits reach every scale (2**31 of them would go with 256 GiB of codes) and save registers.
    a_scale_at = row_in * GROUPS
    if B_TILES:
        b_scale_at = col_in * GROUPS
    else:
        b_scale_at = (tile_n * BLOCK_N // 128) * GROUPS

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, GROUPS):
        a_scale = tl.load(a_scales + a_scale_at + group)
        b_scale = tl.load(b_scales + b_scale_at + group)
        # A dot that starts from zero, then a separate addition: this is the promotion to FP32.
        if B_TILES:
            total += tl.dot(tl.load(a_at), tl.load(b_at)) * a_scale[:, None] * b_scale[None, :]
        else:
            total += tl.dot(tl.load(a_at), tl.load(b_at)) * (a_scale * b_scale)[:, None]
        a_at += 128
        b_at += 128

    inside = (row < M)[:, None] & (col < N)[None, :]
    # One 64-bit address for the tile and 32-bit offsets inside it take fewer registers than 64-bit addresses.
    corner = out + (tile_m * BLOCK_M).to(tl.int64) * N + tile_n * BLOCK_N
    offset = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(corner + offset, total.to(out.dtype.element_ty), mask=inside)
