"""The GEMM of gemm.py and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from kernels.bench import shapes
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape, Sizes
from kernels.bench.oracle import values_of
from kernels.formats.quantize import (
    BLOCKS,
    TILE,
    TILES,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_tiles,
)
from kernels.gemms import gemm
from kernels.gemms.gemm_tiles import Config
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error

CHECKED = ((1, 384, 256), (7, 129, 200), (129, 257, 385), (256, 512, 1024), (0, 128, 128))
SMALL = (512, 512, 512)
# The speed that DeepGEMM's authors state, for an H800.
PUBLISHED = {(4096, 7168, 16384): 1358.0}


def flops(m: int, n: int, k: int) -> int:
    return 2 * m * n * k


def moved(m: int, n: int, k: int, block: tuple[int, int], width: int) -> int:
    """Bytes of both operands' codes and scales, and of an output of `width` bytes an element."""
    groups = -(-k // 128)
    return m * k + n * k + 4 * groups * (m + -(-n // block[0])) + width * m * n


def bf16(a: Quantized, b: Quantized) -> Callable[[], torch.Tensor]:
    """The same product of BF16 matrices."""
    x, w = dequantize(a, torch.bfloat16), dequantize(b, torch.bfloat16)
    return lambda: x @ w.t()


def fp32(a: Quantized, b: Quantized) -> Callable[[], torch.Tensor]:
    x, w = dequantize(a), dequantize(b)
    return lambda: x @ w.t()


def scaled(a: Quantized, b: Quantized, dims: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """torch._scaled_mm with one scale a row (dims (1,)) or a tensor (dims (0, 1)), its fast accumulation."""
    operands = []
    for q in (a, b):
        values = dequantize(q)
        scales = values.abs().amax(dim=dims, keepdim=True).clamp(min=1e-30) / 448
        operands.append(((values / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales))
    (x, x_scale), (w, w_scale) = operands
    return lambda: torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def scaled_blocks(a: Quantized, b: Quantized) -> Callable[[], torch.Tensor]:
    """torch._scaled_mm on our own operands: cuBLAS wants the scales of 1x128 tiles by columns.

    Raises:
        ValueError: K is not a multiple of 128. cuBLAS then reads the scales otherwise: at K = 576 it is far
            off, and ours is not (`CHECKED` has such K, against float64).
    """
    if a.shape[1] % TILE != 0:
        raise ValueError(f"cuBLAS reads the scales otherwise at K = {a.shape[1]}, no multiple of {TILE}")
    a_scales = a.scales.t().contiguous().t()
    b_scales = (b.scales.t().contiguous().t() if b.block == TILES else b.scales).t()
    return lambda: torch._scaled_mm(
        a.codes, b.codes.t(), scale_a=a_scales, scale_b=b_scales, out_dtype=torch.bfloat16
    )


def deepgemm(a: Quantized, b: Quantized) -> Callable[[], torch.Tensor]:
    """DeepGEMM on our own operands."""
    import deep_gemm

    out = torch.empty((a.shape[0], b.shape[0]), device=a.codes.device, dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        deep_gemm.fp8_gemm_nt((a.codes, a.scales), (b.codes, b.scales), out, disable_ue8m0_cast=True)
        return out

    return call


def added(a: Quantized, b: Quantized, out: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A product added into FP32."""
    x, w = dequantize(a, dtype), dequantize(b, dtype)
    sums = torch.zeros_like(out)
    return lambda: sums.add_(x @ w.t())


def launch(config: Config) -> str:
    """A launch shape in words."""
    shared = f", {config.per_sm} on a multiprocessor" if config.per_sm > 1 else ""
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages{shared}"


def launches(a: Quantized, b: Quantized, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The GEMM in each of its launch shapes."""
    return {
        launch(config): partial(gemm.gemm_triton, a, b, dtype, config) for config in gemm.configs_for(b.block)
    }


def add(a: Quantized, b: Quantized, out: torch.Tensor, **options: Any) -> torch.Tensor:
    (gemm.gemm_add_triton if options else gemm.gemm_add)(a, b, out, **options)
    return out


def add_launches(a: Quantized, b: Quantized, out: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """The GEMM that adds in each of its launch shapes, each into a buffer of its own."""
    return {
        launch(config): partial(add, a, b, out.clone(), config=config)
        for config in gemm.configs_for(b.block, add=True)
    }


def moved_add(m: int, n: int, k: int) -> int:
    """Bytes of both operands' codes and scales, and of the FP32 sums, read and written."""
    return moved(m, n, k, TILES, 2 * 4)


def make_add(draw: Draw, m: int, n: int, k: int) -> Inputs:
    a, b = (quantize_tiles(draw.values(rows, k)) for rows in (m, n))
    return a, b, draw.values(m, n)


def error_add(inputs: Inputs, found: torch.Tensor) -> float:
    a, b, before = inputs
    return relative_error(found, before.double() + values_of(a) @ values_of(b).t())


def entry(
    operands: str,
    block: tuple[int, int],
    dtype: torch.dtype,
    timed: Sequence[Shape] = (),
    small: Sizes | None = None,
    goal: float | None = None,
    times_cublas: float | None = None,
) -> Entry:
    def make(draw: Draw, m: int, n: int, k: int) -> Inputs:
        quantize = quantize_blocks if block == BLOCKS else quantize_tiles
        return quantize_tiles(draw.values(m, k)), quantize(draw.values(n, k))

    def error(inputs: Inputs, found: torch.Tensor) -> float:
        return relative_error(found, values_of(inputs[0]) @ values_of(inputs[1]).t())

    whole = dtype == torch.float32
    return Entry(
        "gemm",
        operands,
        make,
        lambda a, b: gemm.gemm(a, b, dtype),
        error,
        f"relative error, {'FP32' if whole else 'BF16'}",
        MAX_ERROR_FP32 if whole else MAX_ERROR_BF16,
        CHECKED,
        moved=partial(moved, block=block, width=dtype.itemsize),
        flops=flops,
        exact=(),
        timed=timed,
        small=small,
        launches=partial(launches, dtype=dtype),
        unit="TFLOPS",
        peers=[
            Peer("cuBLAS BF16", bf16, goal=times_cublas),
            Peer("torch FP32", fp32, "cpu"),
            Peer("_scaled_mm row-wise", partial(scaled, dims=(1,))),
            Peer("_scaled_mm tensor-wise", partial(scaled, dims=(0, 1))),
            Peer("_scaled_mm blockwise", scaled_blocks),
            Peer("DeepGEMM", deepgemm, published=PUBLISHED),
        ],
        goal=goal,
    )


ENTRIES = [
    entry("fprop", BLOCKS, torch.bfloat16, shapes.FPROP, SMALL, goal=1000, times_cublas=1.5),
    entry("dgrad", BLOCKS, torch.bfloat16, shapes.DGRAD, goal=1000, times_cublas=1.5),
    entry("wgrad", TILES, torch.float32, shapes.WGRAD, SMALL, goal=700),
    Entry(
        "gemm_add",
        "wgrad",
        make_add,
        add,
        error_add,
        "relative error, FP32",
        MAX_ERROR_FP32,
        CHECKED,
        moved=moved_add,
        flops=flops,
        exact=(),
        timed=shapes.WGRAD,
        small=SMALL,
        launches=add_launches,
        unit="TFLOPS",
        # Ours adds to its buffer and the peer to its own: after the first call they are not alike.
        peers=[
            Peer("cuBLAS BF16, added", partial(added, dtype=torch.bfloat16), alike=False),
            Peer("torch FP32, added", partial(added, dtype=torch.float32), "cpu", alike=False),
        ],
        goal=700,
    ),
    entry("blocks to FP32", BLOCKS, torch.float32),
    entry("tiles to BF16", TILES, torch.bfloat16),
]
