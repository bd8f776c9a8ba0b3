"""RMSNorm with quantisation, and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.functional import rms_norm

from kernels.bench import quantize
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import off, wrong
from kernels.bench.shapes import DENSE, HIDDEN, TOKENS
from kernels.formats.quantize import TILES, Quantized
from kernels.fused import norm
from kernels.metrics import MAX_ROUNDING_BF16, relative_error

EPS = 1e-6
CHECKED = ((1, 128), (7, 129), (129, 576), (300, 1100))  # rows, columns
SLACK = 2.0**-18  # the sum over a row of 7168 rounds 17 times on its longest way
MAX_ERROR_FP32 = 1e-5
WIDTHS = (HIDDEN, DENSE["q_a_proj"][0])
TIMED = [Shape("", (m, width)) for m in TOKENS for width in WIDTHS]


def moved_forward(rows: int, cols: int) -> int:
    """Bytes of x and the weight in BF16, of codes, scales and inverses."""
    return 2 * rows * cols + 2 * cols + rows * (cols + 4 * -(-cols // 128) + 4)


def moved_backward(rows: int, cols: int) -> int:
    """Bytes of dy, x and the weight in BF16, of the inverses, and of both gradients."""
    return 3 * 2 * rows * cols + 4 * rows + 2 * 2 * cols


def make_forward(draw: Draw, rows: int, cols: int, dtype: torch.dtype) -> Inputs:
    return draw.values(rows, cols, dtype=dtype), 1 + 0.1 * draw.values(cols, dtype=dtype)


def make_backward(draw: Draw, rows: int, cols: int, dtype: torch.dtype) -> Inputs:
    x, weight = make_forward(draw, rows, cols, dtype)
    return draw.values(rows, cols, dtype=dtype), x, weight, inverse_of(x).float()


def inverse_of(x: torch.Tensor) -> torch.Tensor:
    return 1 / torch.sqrt((x.double() ** 2).mean(dim=1) + EPS)


def error_forward(inputs: Inputs, found: tuple[Quantized, torch.Tensor]) -> float:
    x, weight = inputs
    inverse = inverse_of(x)
    exact = x.double() * inverse[:, None] * weight.double()
    return wrong(found[0], exact, slack=SLACK) + off(found[1], inverse, SLACK)


def error_backward(inputs: Inputs, found: tuple[torch.Tensor, torch.Tensor]) -> float:
    dy, x, weight, inverse = (tensor.double() for tensor in inputs)
    normed = x * inverse[:, None]
    scaled = dy * weight
    dx = (scaled - normed * (scaled * normed).mean(dim=1, keepdim=True)) * inverse[:, None]
    return max(relative_error(found[0], dx), relative_error(found[1], (dy * normed).sum(dim=0)))


def eager_forward(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    return lambda: quantize.eager(rms_norm(x, x.shape[1:], weight, EPS), TILES)()


def eager_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The backward pass alone, of a graph that is kept."""
    leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
    out = rms_norm(leaves[0], x.shape[1:], leaves[1], EPS)
    return lambda: torch.autograd.grad(out, leaves, dy, retain_graph=True)[0]


def entries(operands: str, dtype: torch.dtype, timed: Sequence[Shape] = ()) -> list[Entry]:
    small = (512, 1024) if timed else None
    forward = Entry(
        "rmsnorm_quantize",
        operands,
        partial(make_forward, dtype=dtype),
        lambda x, weight: norm.rmsnorm_quantize(x, weight, EPS),
        error_forward,
        "codes, scales and inverses that are wrong",
        0,
        CHECKED,
        moved=moved_forward,
        timed=timed,
        small=small,
        peers=[Peer("F.rms_norm, eager quantisation", eager_forward, "any", alike=False)],
        share=0.8,
    )
    backward = Entry(
        "rmsnorm_backward",
        operands,
        partial(make_backward, dtype=dtype),
        lambda *inputs: norm.rmsnorm_backward(*inputs),
        error_backward,
        f"relative error, {operands}",
        MAX_ROUNDING_BF16 if dtype == torch.bfloat16 else MAX_ERROR_FP32,
        CHECKED,
        moved=moved_backward,
        exact=(0,),
        timed=timed,
        small=small,
        peers=[Peer("F.rms_norm's backward", eager_backward, "any")],
        share=0.8,
    )
    return [forward, backward]


ENTRIES = [*entries("BF16", torch.bfloat16, TIMED), *entries("FP32", torch.float32)]
