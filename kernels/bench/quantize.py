"""The quantisers of quantize.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import wrong
from kernels.bench.shapes import DENSE, DENSE_WIDTH, HIDDEN, TOKENS
from kernels.formats import quantize
from kernels.formats.quantize import BLOCKS, TILES, Quantized

# The scale, its inverse and the product with it round once each.
SLACK = 2.0**-22
CHECKED = ((1, 1), (7, 129), (129, 7), (257, 385), (0, 128))


def moved(rows: int, cols: int, block: tuple[int, int], width: int) -> int:
    """Bytes of quantising a matrix of values of `width` bytes: values in, codes and FP32 scales out."""
    return rows * cols * (width + 1) + 4 * -(-rows // block[0]) * -(-cols // block[1])


def eager(x: torch.Tensor, block: tuple[int, int]) -> Callable[[], object]:
    """Quantisation as one composes it in PyTorch, for whole blocks."""
    rows, cols = x.shape[0] // block[0], x.shape[1] // block[1]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        blocks = x.reshape(rows, block[0], cols, block[1])
        scales = blocks.abs().amax(dim=(1, 3), keepdim=True).float() / 448
        return (blocks / scales).to(torch.float8_e4m3fn).view(x.shape), scales.view(rows, cols)

    return call


def entry(
    name: str,
    block: tuple[int, int],
    timed: Sequence[Shape] = (),
    dtype: torch.dtype = torch.bfloat16,
    power_of_two: bool = False,
    transposed: bool = False,
) -> Entry:
    def make(draw: Draw, rows: int, cols: int) -> Inputs:
        x = draw.values(*((cols, rows) if transposed else (rows, cols)), dtype=dtype, outliers=1e4)
        return (x.t() if transposed else x,)

    def error(inputs: Inputs, found: Quantized) -> float:
        return wrong(found, inputs[0].double(), power_of_two, 0.0 if power_of_two else SLACK)

    kind = "FP32" if dtype == torch.float32 else "BF16"
    return Entry(
        name,
        f"{kind}{' 2^n' if power_of_two else ''}{' transposed' if transposed else ''}",
        make,
        # Looked up at each call: what is measured is what the module holds.
        lambda x: getattr(quantize, name)(x, power_of_two=power_of_two),
        error,
        "codes and scales that are wrong",
        0,
        CHECKED,
        moved=partial(moved, block=block, width=dtype.itemsize),
        timed=timed,
        small=(512, 1024) if timed else None,
        peers=[Peer("eager torch", partial(eager, block=block), "any", alike=False)],
        share=0.8,
    )


ACTIVATIONS = [Shape("", (m, cols)) for m in TOKENS for cols in (HIDDEN, DENSE_WIDTH)]
BY_TOKENS = [Shape("", (HIDDEN, m)) for m in TOKENS]
WEIGHTS = [Shape(name, DENSE[name]) for name in ("q_b_proj", "o_proj", "dense gate_up")]
ENTRIES = [
    entry("quantize_tiles", TILES, ACTIVATIONS),
    entry("quantize_tiles", TILES, BY_TOKENS, transposed=True),
    entry("quantize_tiles", TILES, dtype=torch.float32, power_of_two=True),
    entry("quantize_blocks", BLOCKS, WEIGHTS),
    entry("quantize_blocks", BLOCKS, dtype=torch.float32, power_of_two=True),
]
