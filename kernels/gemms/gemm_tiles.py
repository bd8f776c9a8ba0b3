"""How the FP8 GEMMs are cut into output tiles, and the loop that computes one (`gemm.py`, `grouped_gemm.py`).

One program a multiprocessor walks over output tiles (a persistent kernel), while TMA brings the codes of the
next steps into shared memory. A step multiplies 128 along K, and its products are promoted to FP32 sums on
the CUDA cores (kernels.gemms.gemm says why). So registers hold the sums of a tile and beside them the
products of a step: for 128x256, 256 a thread. LARGE is 128x192, computed in two pieces: a wide one of 128
columns, whose products take 64 registers, and a narrow one of 64, which takes 32. The narrow piece can run on
the tensor cores while the wide one is promoted. Tiles are large because a step loads from the L2 cache:

    tile      bytes a step   FLOP a byte    L2 traffic at 1,000 TFLOPS
    64x64         16 KB           64              15.6 TB/s
    64x128        24 KB           85              11.7 TB/s
    128x128       32 KB          128               7.8 TB/s
    128x192       40 KB          154               6.5 TB/s
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kernels.backend import jit, tl, triton
from kernels.formats.quantize import TILE

BAND = 8  # rows of output tiles walked together, so that their operands stay in the L2 cache
# Not compiled anew for a sum of one step: that is no loop, and the compiler then pipelines the loop over
# output tiles, in more shared memory than there is.
STEPS = ("GROUPS",)
FEWEST_STAGES = 3  # steps in shared memory: one in use, one ready, one on its way


@dataclass(frozen=True)
class Config:
    """A launch shape: output tiles of block_m x (wide + narrow), K in steps of 128.

    A wide piece is 128 columns, one block of a weight's scales, or lies within one, and so does a narrow
    piece: each meets one such scale a step. `num_stages` steps, or as many as fit, wait in shared memory;
    `per_sm` programs share a multiprocessor.
    """

    block_m: int
    wide: int
    narrow: int
    num_warps: int
    num_stages: int
    per_sm: int = 1

    @property
    def block_n(self) -> int:
        """Columns of an output tile."""
        return self.wide + self.narrow

    @property
    def step_bytes(self) -> int:
        """Bytes of codes that a step loads."""
        return (self.block_m + self.block_n) * TILE

    def stages(self, out_bytes: int, shared: int) -> int:
        """Steps that fit into `shared` bytes beside the output tile, of `out_bytes` a value."""
        room = shared - 1024 - self.block_m * self.block_n * out_bytes  # 1024: barriers and scans
        return min(self.num_stages, room // self.step_bytes)

    def tiles(self, m: int, n: int) -> int:
        """Output tiles of an m x n matrix."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    def options(self, out_dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Triton's launch options. Fusion makes scaling and adding a group one instruction."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.stages(out_dtype.itemsize, multiprocessors(device)[1]),
            "enable_fp_fusion": True,
        }


LARGE = Config(block_m=128, wide=128, narrow=64, num_warps=8, num_stages=4)
MEDIUM = Config(block_m=128, wide=128, narrow=0, num_warps=8, num_stages=5)
SMALL = Config(block_m=64, wide=64, narrow=0, num_warps=4, num_stages=4, per_sm=2)
# Where b has 1x128 scales, each column has its own, 32 of a thread for 128 columns, and LARGE spills.
BLOCK_CONFIGS = (LARGE, MEDIUM, SMALL)
TILE_CONFIGS = (MEDIUM, SMALL)


def choose(configs: Iterable[Config], m: int, n: int, out_dtype: torch.dtype, device: torch.device) -> Config:
    """The launch shape for an m x n output: SMALL up to 64 rows, else the one with the least to load.

    That is, with the smallest product of the tiles that the busiest multiprocessor gets and the bytes that a
    step of one loads; of equals, the first.
    """
    if m <= SMALL.block_m:
        return SMALL
    count, _ = multiprocessors(device)
    candidates = fitting(configs, out_dtype, device)
    return min(candidates, key=lambda config: -(-config.tiles(m, n) // count) * config.step_bytes)


def fitting(configs: Iterable[Config], out_dtype: torch.dtype, device: torch.device) -> list[Config]:
    """Those launch shapes of which FEWEST_STAGES steps fit into the shared memory of `device`."""
    _, shared = multiprocessors(device)
    return [config for config in configs if config.stages(out_dtype.itemsize, shared) >= FEWEST_STAGES]


def programs(config: Config, tiles: int, device: torch.device) -> int:
    """Size of the launch grid for this many tiles."""
    return min(tiles, multiprocessors(device)[0] * config.per_sm)


def multiprocessors(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and the bytes of shared memory that a program may use."""
    if device.type != "cuda":  # Triton's interpreter: few programs, so that each walks over several tiles
        return 3, 227 * 1024
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _multiprocessors(index: int) -> tuple[int, int]:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def whole_groups(codes: torch.Tensor) -> torch.Tensor:
    """The codes [..., K] with zero columns added up to a multiple of 128, at an address that TMA can read.

    Rows of a ragged K start at addresses that TMA cannot read. All others are returned as they are.
    """
    missing = -codes.shape[-1] % TILE
    if missing:
        return torch.nn.functional.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype)
    return codes if codes.data_ptr() % 16 == 0 else codes.clone()


def scales_by_group(scales: torch.Tensor) -> torch.Tensor:
    """Scales [rows, groups] of 1x128 tiles as [groups, rows], rows filled up to whole tiles of columns.

    A step reads the scales of neighbouring columns, which then lie side by side.
    """
    missing = -scales.shape[0] % TILE
    turned = torch.nn.functional.pad(scales.t(), (0, missing)) if missing else scales.t()
    return turned.contiguous()


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor whose rows start at addresses that TMA can write: the view of a wider one."""
    width = _whole_lines(shape[-1], dtype)
    return torch.empty((*shape[:-1], width), dtype=dtype, device=device)[..., : shape[-1]]


def fits_tma(out: torch.Tensor) -> bool:
    """Whether TMA can write `out` where it lies: its address and its strides are multiples of 16 bytes."""
    strides = (stride * out.dtype.itemsize % 16 == 0 for stride in out.stride()[:-1])
    return out.data_ptr() % 16 == 0 and all(strides)


def b_pieces(codes: torch.Tensor, config: Config) -> list[Any]:
    """The TMA descriptors of an operand b for a wide and a narrow piece of the output, None without one."""
    return [descriptor(codes, [width, TILE]) if width else None for width in (config.wide, config.narrow)]


def out_pieces(out: torch.Tensor, config: Config) -> list[Any]:
    """The TMA descriptors of an output for its wide and its narrow pieces, None without one."""
    widths = (config.wide, config.narrow)
    return [descriptor(out, [config.block_m, width]) if width else None for width in widths]


def descriptor(tensor: torch.Tensor, block: list[int]) -> Any:
    """The TMA descriptor of a tensor, for blocks of shape `block` (in the last dimensions, else 1)."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton is optional

    whole = [1] * (tensor.dim() - len(block)) + block
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), whole)


def tma_strides(tensor: torch.Tensor) -> list[int]:
    """The strides of a tensor, as TMA takes them.

    Where a dimension is 1, any stride counts as contiguous, also one that TMA refuses.
    """
    strides = [1]
    for size, stride, inner in reversed(
        list(zip(tensor.shape[:-1], tensor.stride()[:-1], tensor.shape[1:], strict=True))
    ):
        strides.insert(0, stride if size > 1 else _whole_lines(inner * strides[0], tensor.dtype))
    return strides


def _whole_lines(values: int, dtype: torch.dtype) -> int:
    """This many values, rounded up to a multiple of 16 bytes: what TMA asks of strides."""
    return -(-values * dtype.itemsize // 16) * 16 // dtype.itemsize


@jit
def output_tile(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """Row and column of an output tile: bands of BAND rows of tiles, each walked by columns."""
    band = tile // (BAND * tiles_n)
    band_rows = min(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + (tile % (BAND * tiles_n)) % band_rows
    tile_n = (tile % (BAND * tiles_n)) // band_rows
    return tile_m, tile_n


@jit
def piece_columns(tile_n, WIDE: tl.constexpr, NARROW: tl.constexpr):
    """First columns of the two pieces of a tile.

    In every other tile the narrow piece comes first: so a wide piece of 128 columns is a block of scales, and
    a narrow one of 64 is half a block.
    """
    first = tile_n * (WIDE + NARROW)
    if NARROW > 0:
        odd = tile_n % 2
        return first + odd * NARROW, first + (1 - odd) * WIDE
    else:
        return first, first


@jit
def promote(total, products, a_scale, b_scale, B_TILES: tl.constexpr):
    """FP32 sums plus the products of a step, which were summed from zero: this is the promotion."""
    if B_TILES:
        return total + products * a_scale[:, None] * b_scale[None, :]
    else:
        return total + products * (a_scale * b_scale)[:, None]


@jit
def sum_groups(
    a, wide_b, narrow_b, a_scale_at, wide_scale_at, narrow_scale_at, row, wide_row, narrow_row, first, groups,
    b_scale_stride, B_TILES: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """FP32 sums of the two pieces of an output tile over `groups` steps, from step `first` on.

    `row` is the first row of the tile in a, `wide_row` and `narrow_row` are those of its pieces in b. Without
    a narrow piece the wide sums are returned twice.
    """
    wide_total = tl.zeros((BLOCK_M, WIDE), dtype=tl.float32)
    if NARROW > 0:
        narrow_total = tl.zeros((BLOCK_M, NARROW), dtype=tl.float32)
    for group in range(first, first + groups):
        a_scale = tl.load(a_scale_at + group)
        wide_scale = tl.load(wide_scale_at + group * b_scale_stride)
        codes = a.load([row, group * 128])
        if NARROW > 0:
            narrow_scale = tl.load(narrow_scale_at + group * b_scale_stride)
            narrow_codes = narrow_b.load([narrow_row, group * 128])
        # Loaded last and used first: then the barrier that the compiler puts before the first use of the last
        # load comes before both products, and none between them makes the warps wait for one another.
        wide_codes = wide_b.load([wide_row, group * 128])
        wide_total = promote(wide_total, tl.dot(codes, wide_codes.T), a_scale, wide_scale, B_TILES)
        if NARROW > 0:
            products = tl.dot(codes, narrow_codes.T)
            narrow_total = promote(narrow_total, products, a_scale, narrow_scale, B_TILES)
    if NARROW > 0:
        return wide_total, narrow_total
    else:
        return wide_total, wide_total


@jit
def stored_tile(out, row, col, rows, cols, stride, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of a piece of the output, and which of them lie inside its `rows` and `cols`."""
    down = tl.arange(0, BLOCK_M)
    right = tl.arange(0, WIDTH)
    # One 64-bit address for the tile and 32-bit offsets inside it take fewer registers than 64-bit addresses.
    at = out + row.to(tl.int64) * stride + col + (down[:, None] * stride + right[None, :])
    return at, (row + down < rows)[:, None] & (col + right < cols)[None, :]
