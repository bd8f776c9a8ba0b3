"""`gemm` and `grouped_gemm` on Hopper, for b in 128x128 blocks: warps specialised by hand.

One warp asks TMA for the codes of the next steps. Two or three warpgroups each own 64 rows of an output tile
of 128 columns: they wait for a step, multiply its 128 along K, say that its memory may be used again, and
promote. None waits for another, so while one promotes, the tensor core multiplies for the others; in one
program of eight warps (`gemm_tiles.py`) all promote together, and the tensor core waits. A warpgroup needs 64
registers a thread for its sums and 64 for the products of a step.

    rows    bytes a step   FLOP a byte    L2 traffic at 1,000 TFLOPS
    128        32 KB          128              7.8 TB/s
    192        40 KB          154              6.5 TB/s

Written in Gluon, Triton's language in which layouts, barriers and waits are spelled out, since the compiler
found none of this. Gluon has no interpreter on a CPU: this kernel runs on a GPU only, and is tested there.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.backend import gl, gluon, gluon_jit, hopper
from kernels.formats.quantize import TILE
from kernels.gemms.gemm_tiles import multiprocessors, tma_strides

WIDTH = 128  # columns of an output tile
PART = 64  # rows of it that one warpgroup owns
ROOM = 227 * 1024 - 1024  # bytes of shared memory for steps and output tiles; the rest is for barriers

if gluon is not None:
    together = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
    mbarrier, tma = hopper.mbarrier, hopper.tma
    fence_async_shared = hopper.fence_async_shared
    warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait


def supported(device: torch.device) -> bool:
    """Whether this kernel runs on a device: Hopper, whose warpgroup products later GPUs do not have."""
    return gluon is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def parts_for(m: int, n: int, device: torch.device) -> int:
    """Warpgroups that multiply, 2 or 3: those with which the busiest multiprocessor loads least."""
    count, _ = multiprocessors(device)
    return min((3, 2), key=lambda parts: -(-_tiles(parts, m, n) // count) * _step_bytes(parts))


def launch(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, out: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """out = a @ b.T over whole groups of codes that TMA can read, b_scales [..., N/128, K/128].

    Offsets divide the rows of a and of out [tokens, N], for b [experts, N, K]. BF16 rows of `out` must start
    where TMA can write them.
    """
    device, (m, n) = out.device, out.shape
    experts = 1 if offsets is None else offsets.numel() - 1
    parts = parts_for(m, n, device)
    half = out.dtype == torch.bfloat16
    most = _tiles(parts, m, n)
    if offsets is not None:  # each expert may add one tile that is not full
        most += experts * -(-n // WIDTH)
    with torch.cuda.device_of(out):
        hopper_kernel[(min(most, multiprocessors(device)[0]),)](
            _descriptor(a, [PART, TILE]), a_scales, _descriptor(b.flatten(0, -2), [WIDTH, TILE]), b_scales,
            _descriptor(out, [PART, WIDTH]) if half else None,
            None if half and offsets is None else out, offsets,
            experts, m, n, a_scales.shape[1], out.stride(0),
            PARTS=parts, BAND=24 // parts, STAGES=stages(parts, half), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def stages(parts: int, half: bool) -> int:
    """Steps that fit into shared memory, beside a BF16 output tile where there is one."""
    room = ROOM - half * parts * PART * WIDTH * 2
    return min(6, room // _step_bytes(parts))


def _tiles(parts: int, m: int, n: int) -> int:
    return -(-m // (parts * PART)) * -(-n // WIDTH)


def _step_bytes(parts: int) -> int:
    return (parts * PART + WIDTH) * TILE


def _descriptor(tensor: torch.Tensor, block: list[int]) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # Triton is optional

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * tensor.element_size(), rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), block, layout)


@gluon_jit
def rows_of(offsets, expert, M):
    """Rows [begin, end) of an expert, or all of them."""
    begin = 0
    end = M
    if offsets is not None:
        begin = gl.load(offsets + expert).to(gl.int32)
        # Offsets are not checked on a GPU: wrong ones must not lead outside of the operands.
        end = min(gl.load(offsets + expert + 1).to(gl.int32), M)
    return begin, end


@gluon_jit
def place(tile, tiles_m, tiles_n, BAND: gl.constexpr):
    """Row and column of an output tile, as `gemm_tiles.output_tile`."""
    band = tile // (BAND * tiles_n)
    band_rows = min(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + (tile % (BAND * tiles_n)) % band_rows
    tile_n = (tile % (BAND * tiles_n)) // band_rows
    return tile_m, tile_n


@gluon_jit
def load_steps(
    a, b, a_codes, b_codes, full, empty, offsets, EXPERTS, M, N, GROUPS,
    PARTS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: asks for the codes of every step as memory gets free."""
    tiles_n = gl.cdiv(N, 128)
    at = 0
    phase = 1
    for expert in range(0, EXPERTS):
        begin, end = rows_of(offsets, expert, M)
        tiles_m = gl.cdiv(max(end - begin, 0), 64 * PARTS)
        b_row = 0
        if offsets is not None:
            b_row = expert * N
        for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
            tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
            row = begin + tile_m * (64 * PARTS)
            for group in range(0, GROUPS):
                mbarrier.wait(empty.index(at), phase)
                bar = full.index(at)
                mbarrier.expect(bar, (64 * PARTS + 128) * 128)
                tma.async_copy_global_to_shared(
                    b, [b_row + tile_n * 128, group * 128], bar, b_codes.index(at)
                )
                for part in gl.static_range(PARTS):
                    codes = a_codes.index(at * PARTS + part)
                    tma.async_copy_global_to_shared(a, [row + part * 64, group * 128], bar, codes)
                at += 1
                if at == STAGES:
                    at = 0
                    phase ^= 1


@gluon_jit
def multiply_steps(
    part: gl.constexpr, a_codes, b_codes, out_tiles, full, empty, a_scales, b_scales, out_tma, out,
    offsets, EXPERTS, M, N, GROUPS, OUT_STRIDE,
    PARTS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the sums of its 64 rows of every output tile of this program."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    tiles_n = gl.cdiv(N, 128)
    at = 0
    phase = 0
    down = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    nothing = gl.zeros([64, 128], gl.float32, mma)
    for expert in range(0, EXPERTS):
        begin, end = rows_of(offsets, expert, M)
        tiles_m = gl.cdiv(max(end - begin, 0), 64 * PARTS)
        for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
            tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
            row = begin + tile_m * (64 * PARTS) + part * 64
            col = tile_n * 128
            a_at = a_scales + gl.where(row + down < end, row + down, begin) * GROUPS
            b_block = tile_n
            if offsets is not None:
                b_block += expert * tiles_n
            b_at = b_scales + b_block * GROUPS
            # Asked for a step ahead: the compiler multiplies them before a product starts.
            a_next = gl.load(a_at)
            b_next = gl.load(b_at)
            total = gl.zeros([64, 128], gl.float32, mma)
            for group in range(0, GROUPS):
                scale = a_next * b_next
                then = min(group + 1, GROUPS - 1)
                a_next = gl.load(a_at + then)
                b_next = gl.load(b_at + then)
                mbarrier.wait(full.index(at), phase)
                codes = a_codes.index(at * PARTS + part)
                other = b_codes.index(at).permute((1, 0))
                products = warpgroup_mma(codes, other, nothing, use_acc=False, is_async=True)
                products = warpgroup_mma_wait(0, deps=[products])
                mbarrier.arrive(empty.index(at), count=1)
                total += products * gl.expand_dims(scale, 1)
                at += 1
                if at == STAGES:
                    at = 0
                    phase ^= 1
            by_tma = out_tma is not None
            if offsets is not None:
                by_tma = by_tma and row + 64 <= end  # or it would write into the rows of the next expert
            if out_tma is not None:  # noqa: SIM102 (the one is known to the compiler, the other is not)
                if by_tma:
                    tile_out = out_tiles.index(part)
                    tma.store_wait(0)
                    together()
                    tile_out.store(total.to(out_tma.dtype))
                    fence_async_shared()
                    together()
                    tma.async_copy_shared_to_global(out_tma, [row, col], tile_out)
            if out is not None:  # noqa: SIM102
                if not by_tma:
                    put(out, total, row, col, end, N, OUT_STRIDE)
    if offsets is not None:  # rows of no expert
        used = gl.load(offsets + EXPERTS).to(gl.int32)
        tiles = gl.cdiv(max(M - used, 0), 64 * PARTS) * tiles_n
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            row = used + tile // tiles_n * (64 * PARTS) + part * 64
            put(out, nothing, row, tile % tiles_n * 128, M, N, OUT_STRIDE)
    if out_tma is not None:
        tma.store_wait(0)


@gluon_jit
def put(out, total, row, col, end, N, OUT_STRIDE):
    """Write 64 rows of a tile from registers, those before `end` only."""
    mma: gl.constexpr = total.type.layout
    down = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    right = gl.arange(0, 128, layout=gl.SliceLayout(0, mma))
    inside = gl.expand_dims(row + down < end, 1) & gl.expand_dims(col + right < N, 0)
    # One 64-bit address a row, and columns as constant offsets from it: whole addresses would be spilled.
    to = out + (row + down).to(gl.int64) * OUT_STRIDE + col
    to = gl.expand_dims(to, 1) + gl.expand_dims(right, 0)
    gl.store(to, total.to(out.dtype.element_ty), mask=inside)


@gluon_jit(do_not_specialize=("GROUPS", "M", "EXPERTS"))
def hopper_kernel(
    a, a_scales, b, b_scales, out_tma, out, offsets, EXPERTS, M, N, GROUPS, OUT_STRIDE,
    PARTS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Each program walks over output tiles of 64 * PARTS x 128, expert by expert. K is 128 * GROUPS.

    a, b and `out_tma` are TMA descriptors; `out` is the output's address, `offsets` is None without experts.
    A step's memory is full when its bytes have come, and empty when all PARTS warpgroups are done with it.
    """
    a_codes = gl.allocate_shared_memory(a.dtype, [STAGES * PARTS, 64, 128], a.layout)
    b_codes = gl.allocate_shared_memory(b.dtype, [STAGES, 128, 128], b.layout)
    if out_tma is not None:
        out_tiles = gl.allocate_shared_memory(out_tma.dtype, [PARTS, 64, 128], out_tma.layout)
    else:  # a few bytes: arguments of warpgroups must exist
        plain: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        out_tiles = gl.allocate_shared_memory(gl.float32, [PARTS, 1, 8], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(STAGES):
        mbarrier.init(full.index(at), count=1)
        mbarrier.init(empty.index(at), count=PARTS)
    fence_async_shared()
    together()
    # The numbers are warps and registers a thread of all but the first; that takes what is left of 64 Ki.
    if PARTS == 3:
        gl.warp_specialize([
            (multiply_steps, (0, a_codes, b_codes, out_tiles, full, empty, a_scales, b_scales, out_tma, out,
                offsets, EXPERTS, M, N, GROUPS, OUT_STRIDE, PARTS, BAND, STAGES)),
            (multiply_steps, (1, a_codes, b_codes, out_tiles, full, empty, a_scales, b_scales, out_tma, out,
                offsets, EXPERTS, M, N, GROUPS, OUT_STRIDE, PARTS, BAND, STAGES)),
            (multiply_steps, (2, a_codes, b_codes, out_tiles, full, empty, a_scales, b_scales, out_tma, out,
                offsets, EXPERTS, M, N, GROUPS, OUT_STRIDE, PARTS, BAND, STAGES)),
            (load_steps, (a, b, a_codes, b_codes, full, empty, offsets, EXPERTS, M, N, GROUPS,
                PARTS, BAND, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (multiply_steps, (0, a_codes, b_codes, out_tiles, full, empty, a_scales, b_scales, out_tma, out,
                offsets, EXPERTS, M, N, GROUPS, OUT_STRIDE, PARTS, BAND, STAGES)),
            (multiply_steps, (1, a_codes, b_codes, out_tiles, full, empty, a_scales, b_scales, out_tma, out,
                offsets, EXPERTS, M, N, GROUPS, OUT_STRIDE, PARTS, BAND, STAGES)),
            (load_steps, (a, b, a_codes, b_codes, full, empty, offsets, EXPERTS, M, N, GROUPS,
                PARTS, BAND, STAGES)),
        ], [4, 1], [232, 24])  # fmt: skip
