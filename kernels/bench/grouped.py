"""The GEMMs over grouped tokens of grouped_gemm.py, and their peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from kernels.bench import shapes
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape, Sizes
from kernels.bench.gemm import launch
from kernels.bench.oracle import values_of
from kernels.formats.grouped_quantize import (
    QuantizedExperts,
    group_starts,
    quantize_experts,
    quantize_tokens,
    token_groups,
)
from kernels.formats.quantize import Quantized, dequantize, quantize_tiles
from kernels.gemms import grouped_gemm
from kernels.gemms.gemm_tiles import TILE_CONFIGS
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error

# Tokens, N, K, experts. With 7 tokens some of the 8 experts have none.
CHECKED = ((1, 128, 256, 4), (7, 129, 200, 8), (129, 257, 128, 3), (600, 256, 384, 4), (0, 128, 128, 2))
ALONG_TOKENS = ((1, 128, 256, 4), (7, 129, 200, 8), (129, 257, 128, 3), (600, 256, 384, 4))

SMALL = (512, 512, 256, 4)


def flops(tokens: int, n: int, k: int, experts: int) -> int:
    return 2 * tokens * n * k


def moved_rows(tokens: int, n: int, k: int, experts: int) -> int:
    """Bytes of the tokens' and all experts' codes and scales, of the offsets and of a BF16 output."""
    groups = -(-k // 128)
    codes = tokens * k + experts * n * k
    return codes + 4 * groups * (tokens + experts * -(-n // 128)) + 8 * (experts + 1) + 2 * tokens * n


def moved_sums(tokens: int, n: int, k: int, experts: int) -> int:
    """Bytes of both operands' codes and scales along the tokens, and of the FP32 sums, read and written."""
    groups = token_groups(tokens, experts)
    return (n + k) * groups * (128 + 4) + 8 * (experts + 1) + 2 * 4 * experts * n * k


def offsets_of(draw: Draw, tokens: int, experts: int) -> torch.Tensor:
    return torch.tensor(shapes.uneven(tokens, experts), device=draw.device)


def make_rows(draw: Draw, tokens: int, n: int, k: int, experts: int) -> Inputs:
    a = quantize_tiles(draw.values(tokens, k))
    # The values of all experts at once would fill the memory.
    parts = [quantize_experts(draw.values(1, n, k)) for _ in range(experts)]
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    b = QuantizedExperts(codes, torch.cat([part.scales for part in parts]))
    return a, b, offsets_of(draw, tokens, experts)


def make_sums(draw: Draw, tokens: int, n: int, k: int, experts: int) -> Inputs:
    offsets = offsets_of(draw, tokens, experts)
    operands = [quantize_tokens(draw.values(tokens, width), offsets) for width in (n, k)]
    out = draw.values(experts, n, k)
    return *operands, offsets, out


def add_sums(
    a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor, **options: Any
) -> torch.Tensor:
    (grouped_gemm.grouped_gemm_k_triton if options else grouped_gemm.grouped_gemm_k)(
        a, b, offsets, out, **options
    )
    return out


def launches_rows(
    a: Quantized, b: QuantizedExperts, offsets: torch.Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """The GEMM over rows in each of its launch shapes."""
    return {
        launch(config): partial(grouped_gemm.grouped_gemm_triton, a, b, offsets, dtype, config)
        for config in grouped_gemm.CONFIGS
    }


def launches_sums(
    a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """The GEMM along tokens in each of its launch shapes, each into a buffer of its own."""
    return {
        launch(config): partial(add_sums, a, b, offsets, out.clone(), config=config)
        for config in TILE_CONFIGS
    }


def error_rows(inputs: Inputs, found: torch.Tensor) -> float:
    a, b, offsets = inputs
    exact, values = torch.zeros(found.shape, dtype=torch.float64, device=found.device), values_of(a)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        exact[begin:end] = values[begin:end] @ values_of(b.expert(e)).t()
    return relative_error(found, exact)


def error_sums(inputs: Inputs, found: torch.Tensor) -> float:
    a, b, offsets, before = inputs
    exact, starts = before.double(), (128 * group_starts(offsets)).tolist()
    for e, (begin, end) in enumerate(itertools.pairwise(starts)):
        exact[e] += values_of(a)[:, begin:end] @ values_of(b)[:, begin:end].t()
    return relative_error(found, exact)


def each(
    a: Quantized, b: QuantizedExperts, offsets: torch.Tensor, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """One product an expert: this peer must know the offsets on the host, ours need not."""
    x, weights, bounds = dequantize(a, dtype), values_of_experts(b, dtype), offsets.tolist()
    out = torch.zeros((x.shape[0], b.shape[1]), dtype=dtype, device=x.device)

    def call() -> torch.Tensor:
        for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
            torch.mm(x[begin:end], weights[e].t(), out=out[begin:end])
        return out

    return call


def bf16_grouped(a: Quantized, b: QuantizedExperts, offsets: torch.Tensor) -> Callable[[], torch.Tensor]:
    x, weights = dequantize(a, torch.bfloat16), values_of_experts(b, torch.bfloat16)
    ends = offsets[1:].int()
    return lambda: torch.nn.functional.grouped_mm(x, weights.mT, offs=ends)


def each_sum(
    a: Quantized, b: Quantized, offsets: torch.Tensor, out: torch.Tensor, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """One product an expert, added into FP32."""
    left, right = dequantize(a, dtype), dequantize(b, dtype)
    starts, sums = (128 * group_starts(offsets)).tolist(), torch.zeros_like(out)

    def call() -> torch.Tensor:
        for e, (begin, end) in enumerate(itertools.pairwise(starts)):
            sums[e] += left[:, begin:end] @ right[:, begin:end].t()
        return sums

    return call


def values_of_experts(b: QuantizedExperts, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([dequantize(b.expert(e), dtype) for e in range(b.shape[0])])


def one_by_one(build: Callable[..., Callable[[], torch.Tensor]], alike: bool = True) -> list[Peer]:
    """cuBLAS's products in BF16 on a GPU, torch's in FP32 on a CPU."""
    return [
        Peer("cuBLAS BF16 by expert", partial(build, dtype=torch.bfloat16), alike=alike),
        Peer("torch FP32 by expert", partial(build, dtype=torch.float32), "cpu", alike=alike),
    ]


def deepgemm(a: Quantized, b: QuantizedExperts, offsets: torch.Tensor) -> Callable[[], torch.Tensor]:
    """DeepGEMM on the same tokens, each expert's filled up to whole groups of 128 rows as it requires."""
    import deep_gemm

    device, experts = a.codes.device, b.shape[0]
    rows = 128 * token_groups(a.shape[0], experts)
    codes = torch.zeros((rows, a.shape[1]), dtype=torch.uint8, device=device)
    scales = torch.zeros((rows, a.scales.shape[1]), device=device)
    expert_of = torch.full((rows,), -1, dtype=torch.int32, device=device)
    place = torch.empty(a.shape[0], dtype=torch.int64, device=device)
    starts = (128 * group_starts(offsets)).tolist()
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        place[begin:end] = torch.arange(starts[e], starts[e] + end - begin, device=device)
        expert_of[starts[e] : starts[e + 1]] = e
    codes[place], scales[place] = a.codes.view(torch.uint8), a.scales
    left = (codes.view(torch.float8_e4m3fn), scales)
    out = torch.empty((rows, b.shape[1]), dtype=torch.bfloat16, device=device)

    def run() -> None:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            left, (b.codes, b.scales), out, expert_of, disable_ue8m0_cast=True
        )

    run()
    error = relative_error(out[place], grouped_gemm.grouped_gemm(a, b, offsets))
    if not error < MAX_ERROR_BF16:
        raise RuntimeError(f"its result differs by {error:.3g}")
    return run


def rows_entry(
    operands: str, dtype: torch.dtype, timed: Sequence[Shape] = (), small: Sizes | None = None
) -> Entry:
    whole = dtype == torch.float32
    return Entry(
        "grouped_gemm",
        operands,
        make_rows,
        lambda a, b, offsets: grouped_gemm.grouped_gemm(a, b, offsets, dtype),
        error_rows,
        f"relative error, {'FP32' if whole else 'BF16'}",
        MAX_ERROR_FP32 if whole else MAX_ERROR_BF16,
        CHECKED,
        moved=moved_rows,
        flops=flops,
        exact=(),
        timed=timed,
        small=small,
        launches=partial(launches_rows, dtype=dtype),
        unit="TFLOPS",
        peers=[
            *one_by_one(each),
            Peer("F.grouped_mm BF16", bf16_grouped),
            Peer("DeepGEMM contiguous", deepgemm, alike=False),
        ],
        goal=900,
    )


ENTRIES = [
    rows_entry("fprop", torch.bfloat16, shapes.GROUPED_FPROP, SMALL),
    rows_entry("dgrad", torch.bfloat16, shapes.GROUPED_DGRAD),
    rows_entry("to FP32", torch.float32),
    Entry(
        "grouped_gemm_k",
        "wgrad",
        make_sums,
        add_sums,
        error_sums,
        "relative error, FP32",
        MAX_ERROR_FP32,
        ALONG_TOKENS,
        moved=moved_sums,
        flops=flops,
        exact=(),
        timed=shapes.GROUPED_WGRAD,
        small=SMALL,
        launches=launches_sums,
        unit="TFLOPS",
        # Ours adds to its buffer and the peer to its own: after the first call they are not alike.
        peers=one_by_one(each_sum, alike=False),
        goal=700,
    ),
]
