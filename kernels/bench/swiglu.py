"""SwiGLU with quantisation, from values and from their FP8 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.functional import silu

from kernels.bench import quantize
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import values_of, wrong
from kernels.bench.shapes import DENSE_WIDTH, EXPERT_WIDTH, EXPERTS, TOKENS
from kernels.formats.quantize import TILES, Quantized, dequantize, quantize_tiles
from kernels.fused import swiglu
from kernels.metrics import MAX_ROUNDING_BF16, relative_error

CHECKED = ((1, 128), (7, 129), (129, 200), (33, 1100))  # rows, F
SLACK = 2.0**-19  # the exponential is right to 2**-23, and some five roundings follow
MAX_ERROR_FP32 = 1e-5  # of a gradient; that of a routing weight is a sum over a row

Both = torch.Tensor | Quantized
DENSE = [Shape("dense", (m, DENSE_WIDTH)) for m in TOKENS]
ROUTED = [Shape("experts", (m * EXPERTS[0], EXPERT_WIDTH)) for m in TOKENS]


def moved_forward(rows: int, width: int, cached: bool, weighted: bool) -> int:
    """Bytes of the inputs (BF16, or codes with scales), of weights, and of the output's codes and scales."""
    return _inputs(rows, width, cached, weighted) + rows * (width + 4 * -(-width // 128))


def moved_backward(rows: int, width: int, cached: bool, weighted: bool) -> int:
    """Bytes of the inputs, of a BF16 gradient of the output, and of both gradients going back."""
    return _inputs(rows, width, cached, weighted) + rows * (6 * width + 4 * weighted)


def _inputs(rows: int, width: int, cached: bool, weighted: bool) -> int:
    row = 2 * width + 4 * -(-2 * width // 128) if cached else 4 * width
    return rows * (row + 4 * weighted)


def make(
    draw: Draw, rows: int, width: int, dtype: torch.dtype, cached: bool, weighted: bool, back: bool
) -> Inputs:
    values = draw.values(rows, 2 * width, dtype=dtype)
    both = quantize_tiles(values) if cached else values
    weights = draw.uniform(rows) if weighted else None
    return (draw.values(rows, width, dtype=dtype), both, weights) if back else (both, weights)


def halves(both: Both) -> tuple[torch.Tensor, ...]:
    """Gates and ups in float64. A cached value is the FP32 product of code and scale."""
    values = values_of(both).float() if isinstance(both, Quantized) else both
    return values.double().chunk(2, dim=1)


def error_forward(inputs: Inputs, found: Quantized) -> float:
    (gate, up), weights = halves(inputs[0]), inputs[1]
    exact = gate * torch.sigmoid(gate) * up
    return wrong(found, exact if weights is None else exact * weights.double()[:, None], slack=SLACK)


def error_backward(inputs: Inputs, found: tuple[torch.Tensor, torch.Tensor | None]) -> float:
    dy, both, weights = inputs
    (gate, up), grad = halves(both), dy.double()
    sigmoid = torch.sigmoid(gate)
    errors = []
    if weights is not None:
        errors.append(relative_error(found[1], (grad * gate * sigmoid * up).sum(dim=1)))
        grad = grad * weights.double()[:, None]
    exact = torch.cat([grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid], dim=1)
    return max(*errors, relative_error(found[0], exact)) if errors else relative_error(found[0], exact)


def eager_forward(both: Both, weights: torch.Tensor | None) -> Callable[[], object]:
    values = dequantize(both, torch.bfloat16) if isinstance(both, Quantized) else both

    def call() -> object:
        gate, up = values.chunk(2, dim=1)
        out = silu(gate) * up
        return quantize.eager(out if weights is None else out * weights[:, None], TILES)()

    return call


def eager_backward(dy: torch.Tensor, both: Both, weights: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    values = dequantize(both, dy.dtype) if isinstance(both, Quantized) else both
    leaves = [leaf.detach().requires_grad_() for leaf in (values, weights) if leaf is not None]

    def call() -> torch.Tensor:
        gate, up = leaves[0].chunk(2, dim=1)
        out = silu(gate) * up
        out = out if weights is None else (out * leaves[1][:, None]).to(dy.dtype)
        return torch.autograd.grad(out, leaves, dy)[0]

    return call


def entries(
    operands: str, dtype: torch.dtype, cached: bool, weighted: bool, timed: Sequence[Shape] = ()
) -> list[Entry]:
    kind = {"cached": cached, "weighted": weighted}
    small = (512, 1024) if timed else None
    bf16 = dtype == torch.bfloat16
    # In the peers the cached values are BF16 already: they read more, and need not dequantise.
    forward = Entry(
        "swiglu_quantize",
        operands,
        partial(make, dtype=dtype, back=False, **kind),
        lambda both, weights: swiglu.swiglu_quantize(both, weights),
        error_forward,
        "codes and scales that are wrong",
        0,
        CHECKED,
        moved=partial(moved_forward, **kind),
        timed=timed,
        small=small,
        peers=[Peer("eager torch from BF16", eager_forward, "any", alike=False)],
        share=0.8,
    )
    backward = Entry(
        "swiglu_backward",
        operands,
        partial(make, dtype=dtype, back=True, **kind),
        lambda dy, both, weights: swiglu.swiglu_backward(dy, both, weights),
        error_backward,
        f"relative error, {'BF16' if bf16 else 'FP32'}",
        MAX_ROUNDING_BF16 if bf16 else MAX_ERROR_FP32,
        CHECKED,
        moved=partial(moved_backward, **kind),
        timed=timed,
        small=small,
        peers=[Peer("eager torch from BF16", eager_backward, "any")],
        share=0.8,
    )
    return [forward, backward]


ENTRIES = [
    *entries("BF16", torch.bfloat16, cached=False, weighted=False, timed=DENSE),
    *entries("FP8, weighted", torch.bfloat16, cached=True, weighted=True, timed=ROUTED),
    *entries("FP32, weighted", torch.float32, cached=False, weighted=True),
]
