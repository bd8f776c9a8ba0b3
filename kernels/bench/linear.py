"""Whole linear layers, forward and backward: their GEMMs with all quantisation that they need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from kernels.bench import shapes
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import values_of
from kernels.formats.quantize import dequantize, quantize_blocks, quantize_tiles
from kernels.layers import grouped_linear, linear
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error

CHECKED = ((1, 129, 200), (7, 128, 256), (129, 257, 385))  # tokens, out, in
GROUPED_CHECKED = ((7, 129, 200, 8), (300, 128, 256, 3))  # and experts
TIMED = [Shape(name, (m, *shapes.DENSE[name])) for m in shapes.TOKENS for name in ("o_proj", "dense gate_up")]
GROUPED_TIMED = [
    Shape(name, (m * experts, *shapes.ROUTED[name], experts))
    for experts in shapes.EXPERTS[:1]
    for m in shapes.TOKENS
    for name in shapes.ROUTED
]
Layer = Callable[..., torch.Tensor]
Results = tuple[torch.Tensor, ...]


def flops(tokens: int, n: int, k: int, experts: int = 1) -> int:
    """Three products."""
    return 6 * tokens * n * k


def moved(tokens: int, n: int, k: int, experts: int = 1) -> int:
    """Bytes of x, dy and the weight, of y and both gradients, all BF16."""
    return 2 * 2 * (tokens * (n + k) + experts * n * k)


def make(draw: Draw, tokens: int, n: int, k: int, experts: int = 0, *, dtype: torch.dtype) -> Inputs:
    """x, weight and dy; with experts, their offsets after the weight."""
    x, dy = draw.values(tokens, k, dtype=dtype), draw.values(tokens, n, dtype=dtype)
    if not experts:
        return x, draw.values(n, k, dtype=dtype), dy
    offsets = torch.tensor(shapes.uneven(tokens, experts), device=draw.device)
    return x, draw.values(experts, n, k, dtype=dtype), offsets, dy


def forward_and_back(layer: Layer, *inputs: Any) -> Results:
    """y, dx and dw of a layer that is called with x, the weight and whatever else there is before dy."""
    x, weight, *others, dy = inputs
    leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
    y = layer(*leaves, *others)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def exact(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> Results:
    """The three products in float64. Their operands come from the quantisers, which have their own checks:
    otherwise codes next to a midpoint, which may fall either way, would be all that this sees."""
    cached, blocks = quantize_tiles(x), values_of(quantize_blocks(weight))
    by_token = values_of(quantize_tiles(dequantize(cached).t()))
    return (
        values_of(cached) @ blocks.t(),
        values_of(quantize_tiles(dy)) @ blocks,
        values_of(quantize_tiles(dy.t())) @ by_token.t(),
    )


def error(inputs: Inputs, found: Results) -> float:
    return max(relative_error(*pair) for pair in zip(found, exact(*inputs), strict=True))


def error_grouped(inputs: Inputs, found: Results) -> float:
    x, weight, offsets, dy = inputs
    y, dx, dw = (torch.zeros_like(tensor, dtype=torch.float64) for tensor in found)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin < end:
            rows = slice(begin, end)
            y[rows], dx[rows], dw[e] = exact(x[rows], weight[e], dy[rows])
    return max(relative_error(*pair) for pair in zip(found, (y, dx, dw), strict=True))


def experts_apart(x: torch.Tensor, weight: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each expert's rows times its matrix."""
    return torch.cat([part @ w.t() for part, w in zip(x.split(counts), weight, strict=True)])


def apart(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, dy: torch.Tensor
) -> Callable[[], Results]:
    """This peer must know the offsets on the host, ours need not: they are read untimed."""
    return partial(forward_and_back, experts_apart, x, weight, offsets.diff().tolist(), dy)


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(x, weight.mT, offs=offsets[1:].int())


def peer(name: str, layer: Layer, device: str = "any") -> Peer:
    return Peer(name, lambda *inputs: lambda: forward_and_back(layer, *inputs), device)


def entry(dtype: torch.dtype, timed: Sequence[Shape] = ()) -> Entry:
    kind = "FP32" if dtype == torch.float32 else "BF16"
    return Entry(
        "fp8_linear",
        f"{kind}, 3 products",
        partial(make, dtype=dtype),
        # Looked up at each call: what is measured is what the module holds.
        lambda *inputs: forward_and_back(linear.fp8_linear, *inputs),
        error,
        f"relative error of y, dx and dw, {kind}",
        MAX_ERROR_FP32 if dtype == torch.float32 else MAX_ERROR_BF16,
        CHECKED,
        moved=moved,
        flops=flops,
        exact=(),
        timed=timed,
        small=None if timed else (512, 512, 512),
        unit="TFLOPS",
        peers=[peer(f"F.linear {kind}", torch.nn.functional.linear)],
        kernel="gemm_triton",
    )


def grouped_entry(dtype: torch.dtype, timed: Sequence[Shape] = ()) -> Entry:
    kind = "FP32" if dtype == torch.float32 else "BF16"
    return Entry(
        "fp8_grouped_linear",
        f"{kind}, 3 products",
        partial(make, dtype=dtype),
        lambda *inputs: forward_and_back(grouped_linear.fp8_grouped_linear, *inputs),
        error_grouped,
        f"relative error of y, dx and dw, {kind}",
        MAX_ERROR_FP32 if dtype == torch.float32 else MAX_ERROR_BF16,
        GROUPED_CHECKED,
        moved=moved,
        flops=flops,
        exact=(),
        timed=timed,
        small=None if timed else (512, 512, 256, 4),
        unit="TFLOPS",
        peers=[
            Peer(f"expert by expert {kind}", apart, "any"),
            peer("F.grouped_mm BF16", grouped_mm, "cuda"),
        ],
        kernel="grouped_gemm_triton",
    )


# Timed on a CPU as well: there in FP32, the type that it is fast in.
ENTRIES = [
    entry(torch.bfloat16, TIMED),
    entry(torch.float32),
    grouped_entry(torch.bfloat16, GROUPED_TIMED),
    grouped_entry(torch.float32),
]
