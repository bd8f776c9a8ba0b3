"""Quantisation along both sides of a matrix: transpose.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.bench import e5m6, quantize
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import spread, values_of, wrong
from kernels.bench.quantize import ACTIVATIONS, CHECKED, SLACK, WEIGHTS
from kernels.bench.shapes import DENSE, HIDDEN, TOKENS
from kernels.formats import transpose
from kernels.formats.e5m6 import E5M6, quantize_e5m6
from kernels.formats.quantize import BLOCKS, TILES, Quantized, dequantize, quantize_tiles

CACHED = [Shape("", (m, HIDDEN)) for m in TOKENS]
ATTENTION = [Shape("o_proj's input", (m, DENSE["o_proj"][1])) for m in TOKENS]
Both = tuple[Quantized, Quantized]


def moved_both(rows: int, cols: int, block: tuple[int, int], width: int) -> int:
    """Bytes of values of `width` bytes, and twice of codes and scales."""
    scales = -(-rows // block[0]) * -(-cols // block[1]) + -(-cols // block[0]) * -(-rows // block[1])
    return rows * cols * (width + 2) + 4 * scales


def moved_turned(rows: int, cols: int) -> int:
    """Bytes of codes and scales along the rows, and of codes and scales along the columns."""
    return 2 * rows * cols + 4 * (rows * -(-cols // 128) + cols * -(-rows // 128))


def moved_from_e5m6(rows: int, cols: int) -> int:
    """Bytes of packed codes and their scales, and of codes and scales along the columns."""
    return rows * 3 * -(-cols // 2) + rows * cols + 4 * (rows * -(-cols // 128) + cols * -(-rows // 128))


def make_cached(draw: Draw, rows: int, cols: int, power_of_two: bool, packed: bool) -> Inputs:
    x = draw.values(rows, cols, outliers=1e4)
    return (quantize_e5m6(x) if packed else quantize_tiles(x, power_of_two=power_of_two),)


def error_both(inputs: Inputs, found: Both, power_of_two: bool) -> float:
    x, slack = inputs[0].double(), 0.0 if power_of_two else SLACK
    return wrong(found[0], x, power_of_two, slack) + wrong(found[1], x.t(), power_of_two, slack)


def error_turned(inputs: Inputs, found: Quantized, power_of_two: bool) -> float:
    """Against the cached values, which are FP32 products of code and scale."""
    q = inputs[0]
    if isinstance(q, E5M6):
        exact = e5m6.codes_of(q) * spread(q.scales, TILES, q.shape)
    else:
        exact = values_of(q).float().double()
    return wrong(found, exact.t(), power_of_two, 0.0 if power_of_two else SLACK)


def eager_both(x: torch.Tensor, block: tuple[int, int]) -> Callable[[], object]:
    """The tiles of both sides, or blocks and their transposed codes and scales."""
    along, across = quantize.eager(x, block), quantize.eager(x.t(), block)

    def call() -> object:
        if block == TILES:
            return along(), across()
        codes, scales = along()
        return codes, scales, codes.t().contiguous(), scales.t().contiguous()

    return call


def eager_turned(q: Quantized) -> Callable[[], object]:
    return lambda: quantize.eager(dequantize(q, torch.bfloat16).t(), TILES)()


def both_entry(
    name: str,
    block: tuple[int, int],
    timed: Sequence[Shape] = (),
    dtype: torch.dtype = torch.bfloat16,
    power_of_two: bool = False,
) -> Entry:
    return Entry(
        name,
        f"{'FP32' if dtype == torch.float32 else 'BF16'}{' 2^n' if power_of_two else ''}",
        lambda draw, rows, cols: (draw.values(rows, cols, dtype=dtype, outliers=1e4),),
        lambda x: getattr(transpose, name)(x, power_of_two=power_of_two),
        partial(error_both, power_of_two=power_of_two),
        "codes and scales that are wrong",
        0,
        CHECKED,
        moved=partial(moved_both, block=block, width=dtype.itemsize),
        timed=timed,
        small=(512, 1024) if timed else None,
        peers=[Peer("eager torch", partial(eager_both, block=block), "any", alike=False)],
        share=0.8,
    )


def turned_entry(
    operands: str, packed: bool, power_of_two: bool = False, timed: Sequence[Shape] = ()
) -> Entry:
    return Entry(
        "requantize_transpose",
        operands,
        partial(make_cached, power_of_two=power_of_two, packed=packed),
        lambda q: transpose.requantize_transpose(q, power_of_two=power_of_two),
        partial(error_turned, power_of_two=power_of_two),
        "codes and scales that are wrong",
        0,
        (*CHECKED, (7, 136)),  # of E5M6 only whole words are read as they lie
        moved=moved_from_e5m6 if packed else moved_turned,
        timed=timed,
        small=(512, 1024) if timed else None,
        peers=[] if packed else [Peer("eager torch", eager_turned, "any", alike=False)],
        share=0.8,
    )


ENTRIES = [
    both_entry("quantize_both", TILES, ACTIVATIONS),
    both_entry("quantize_both", TILES, dtype=torch.float32, power_of_two=True),
    both_entry("quantize_blocks_both", BLOCKS, WEIGHTS),
    both_entry("quantize_blocks_both", BLOCKS, dtype=torch.float32, power_of_two=True),
    turned_entry("FP8", packed=False, timed=CACHED),
    turned_entry("FP8 2^n", packed=False, power_of_two=True),
    turned_entry("E5M6 2^n", packed=True, power_of_two=True, timed=ATTENTION),
]
