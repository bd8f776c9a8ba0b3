"""E5M6: 12-bit codes, two in three bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import block_amax, nearest, power_above, spread
from kernels.bench.shapes import DENSE, TOKENS
from kernels.formats import e5m6
from kernels.formats.e5m6 import E5M6, dequantize_e5m6_reference, quantize_e5m6, quantize_e5m6_reference
from kernels.formats.quantize import TILES

CHECKED = ((1, 1), (7, 129), (129, 258), (65, 511), (0, 128))
TIMED = [Shape("o_proj's input", (m, DENSE["o_proj"][1])) for m in TOKENS]


def moved(rows: int, cols: int, width: int) -> int:
    """Bytes of values of `width` bytes, of packed codes and FP32 scales, whichever way."""
    return rows * (cols * width + 3 * -(-cols // 2) + 4 * -(-cols // 128))


def make(draw: Draw, rows: int, cols: int, dtype: torch.dtype) -> Inputs:
    return (draw.values(rows, cols, dtype=dtype, outliers=1e4),)


def make_packed(draw: Draw, rows: int, cols: int) -> Inputs:
    return (quantize_e5m6(draw.values(rows, cols)),)


def codes_of(q: E5M6) -> torch.Tensor:
    """The float64 numbers that the codes are, without scales: a code is the upper 12 bits of an FP16."""
    low, middle, high = q.packed.long().unflatten(1, (q.packed.shape[1] // 3, 3)).unbind(2)
    words = low | middle << 8 | high << 16
    codes = torch.stack([words & 0xFFF, words >> 12], dim=2).flatten(1)[:, : q.cols]
    return (codes << 4).to(torch.int16).view(torch.float16).double()


def error_codes(inputs: Inputs, found: E5M6) -> float:
    x = inputs[0].double()
    amax = block_amax(x, TILES)
    scales = torch.where(amax == 0, 1.0, power_above(amax / 65024).clamp(min=2.0**-126))
    expected = nearest(x / spread(scales, TILES, x.shape), 6, -14, 65024.0)
    codes = codes_of(found)
    unlike = (codes != expected) | (torch.signbit(codes) != torch.signbit(expected))
    return int((found.scales != scales).sum()) + int(unlike.sum())


def error_values(inputs: Inputs, found: torch.Tensor) -> float:
    """A code has 7 significant bits and a scale none: the product fits even BF16."""
    exact = codes_of(inputs[0]) * spread(inputs[0].scales, TILES, inputs[0].shape)
    return int((found.double() != exact).sum())


def quantizer(operands: str, dtype: torch.dtype, timed: Sequence[Shape] = ()) -> Entry:
    return Entry(
        "quantize_e5m6",
        operands,
        partial(make, dtype=dtype),
        lambda x: e5m6.quantize_e5m6(x),
        error_codes,
        "codes and scales that are wrong",
        0,
        CHECKED,
        moved=partial(moved, width=dtype.itemsize),
        timed=timed,
        small=(512, 1024) if timed else None,
        peers=[Peer("eager torch", lambda x: lambda: quantize_e5m6_reference(x), alike=False)],
        share=0.8,
    )


def dequantizer(operands: str, dtype: torch.dtype, timed: Sequence[Shape] = ()) -> Entry:
    return Entry(
        "dequantize_e5m6",
        operands,
        make_packed,
        lambda q: e5m6.dequantize_e5m6(q, dtype),
        error_values,
        "values that are wrong",
        0,
        CHECKED,
        moved=partial(moved, width=dtype.itemsize),
        timed=timed,
        small=(512, 1024) if timed else None,
        peers=[
            Peer("eager torch", lambda q: lambda: dequantize_e5m6_reference(q, dtype)),
        ],
        share=0.8,
    )


ENTRIES = [
    quantizer("BF16", torch.bfloat16, TIMED),
    quantizer("FP32", torch.float32),
    dequantizer("BF16", torch.bfloat16, TIMED),
    dequantizer("FP32", torch.float32),
]
