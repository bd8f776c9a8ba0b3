"""Quantisation of tokens grouped by expert, and of all experts' weights: grouped_quantize.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.bench import quantize, transpose
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import values_of, wrong
from kernels.bench.quantize import SLACK
from kernels.bench.shapes import EXPERT_WIDTH, EXPERTS, HIDDEN, ROUTED, TOKENS, uneven
from kernels.formats import grouped_quantize
from kernels.formats.grouped_quantize import QuantizedExperts, token_groups
from kernels.formats.quantize import BLOCKS, TILES, Quantized, dequantize, quantize_tiles

CHECKED = ((1, 128, 4), (7, 129, 8), (129, 200, 3), (600, 256, 4), (0, 128, 2))  # tokens, channels, experts
WEIGHTS_CHECKED = ((1, 128, 128), (3, 129, 200), (2, 7, 385))  # experts, N, K
TIMED = [
    Shape("experts", (m * experts, channels, experts))
    for m, experts in zip(reversed(TOKENS), EXPERTS, strict=True)
    for channels in (HIDDEN, 2 * EXPERT_WIDTH)
]
WEIGHTS = [Shape(name, (EXPERTS[1], *sizes)) for name, sizes in ROUTED.items()]


def moved_tokens(tokens: int, channels: int, experts: int, width: int, both: bool) -> int:
    """Bytes of values (of one byte: codes, with their scales), of the offsets, and of the codes and scales
    along each expert's tokens, or along channels as well."""
    groups, tiles = token_groups(tokens, experts), -(-channels // 128)
    read = tokens * channels * width + 8 * (experts + 1) + (4 * tokens * tiles if width == 1 else 0)
    rows = tokens * (channels + 4 * tiles) if both else 0
    return read + rows + groups * channels * (128 + 4)


def moved_experts(experts: int, n: int, k: int, both: bool) -> int:
    """Bytes of BF16 weights, and of codes and scales, or of two."""
    return experts * (2 * n * k + (1 + both) * (n * k + 4 * -(-n // 128) * -(-k // 128)))


def make(draw: Draw, tokens: int, channels: int, experts: int, dtype: torch.dtype) -> Inputs:
    """Tokens and offsets; of what is checked the last three tokens belong to no expert."""
    owned = max(0, tokens - 3) if draw.rough and tokens > 7 else tokens
    offsets = torch.tensor(uneven(owned, experts), device=draw.device)
    return draw.values(tokens, channels, dtype=dtype, outliers=1e4), offsets


def make_cached(draw: Draw, tokens: int, channels: int, experts: int) -> Inputs:
    x, offsets = make(draw, tokens, channels, experts, torch.float32)
    return quantize_tiles(x), offsets


def by_tokens(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """float64 [channels, 128 * groups]: each expert's tokens from the start of a tile, zeros between."""
    bounds = offsets.tolist()
    out = x.new_zeros(128 * token_groups(x.shape[0], len(bounds) - 1), x.shape[1], dtype=torch.float64)
    start = 0
    for begin, end in itertools.pairwise(bounds):
        out[start : start + end - begin] = x[begin:end]
        start += -(-(end - begin) // 128) * 128
    return out.t()


def error_tokens(inputs: Inputs, found: Quantized) -> float:
    x, offsets = inputs
    values = values_of(x).float() if isinstance(x, Quantized) else x
    return wrong(found, by_tokens(values, offsets), slack=SLACK)


def error_tokens_both(inputs: Inputs, found: tuple[Quantized, Quantized]) -> float:
    x, offsets = inputs
    rows = x.double()
    rows[int(offsets[-1]) :] = 0
    return wrong(found[0], rows, slack=SLACK) + error_tokens(inputs, found[1])


def error_experts(inputs: Inputs, found: QuantizedExperts) -> float:
    return sum(wrong(found.expert(e), w.double(), slack=SLACK) for e, w in enumerate(inputs[0]))


def error_experts_both(inputs: Inputs, found: tuple[QuantizedExperts, QuantizedExperts]) -> float:
    return error_experts(inputs, found[0]) + error_experts((inputs[0].mT,), found[1])


def padded(x: torch.Tensor, offsets: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A gather of the tokens into whole groups: its rows are found on the host, untimed."""
    place = by_tokens(torch.arange(1, x.shape[0] + 1, device=x.device)[:, None], offsets)[0].long()
    source = (place - 1).clamp(min=0)
    missing = (place == 0)[:, None]
    return lambda: x.index_select(0, source).masked_fill_(missing, 0)


def eager_tokens(x: torch.Tensor, offsets: torch.Tensor) -> Callable[[], object]:
    gather = padded(x, offsets)
    return lambda: quantize.eager(gather().t(), TILES)()


def eager_tokens_both(x: torch.Tensor, offsets: torch.Tensor) -> Callable[[], object]:
    rows, tokens = quantize.eager(x, TILES), eager_tokens(x, offsets)
    return lambda: (rows(), tokens())


def eager_cached(q: Quantized, offsets: torch.Tensor) -> Callable[[], object]:
    gather = padded(q.codes.view(torch.uint8), offsets)
    scales = padded(q.scales, offsets)

    def call() -> object:
        tiles = Quantized(gather().view(torch.float8_e4m3fn), scales(), TILES)
        return quantize.eager(dequantize(tiles, torch.bfloat16).t(), TILES)()

    return call


def eager_experts(w: torch.Tensor, both: bool) -> Callable[[], object]:
    rows = w.view(-1, w.shape[2])
    return transpose.eager_both(rows, BLOCKS) if both else quantize.eager(rows, BLOCKS)


def tokens_entry(name: str, dtype: torch.dtype, timed: Sequence[Shape] = ()) -> Entry:
    both = name == "quantize_tokens_both"
    return Entry(
        name,
        "FP32" if dtype == torch.float32 else "BF16",
        partial(make, dtype=dtype),
        lambda x, offsets: getattr(grouped_quantize, name)(x, offsets),
        error_tokens_both if both else error_tokens,
        "codes and scales that are wrong",
        0,
        CHECKED,
        moved=partial(moved_tokens, width=dtype.itemsize, both=both),
        timed=timed,
        small=(512, 512, 4) if timed else None,
        peers=[Peer("eager torch", eager_tokens_both if both else eager_tokens, "any", alike=False)],
        share=0.8,
    )


def experts_entry(name: str) -> Entry:
    both = name == "quantize_experts_both"
    return Entry(
        name,
        "BF16",
        lambda draw, *sizes: (draw.values(*sizes, dtype=torch.bfloat16, outliers=1e4),),
        lambda w: getattr(grouped_quantize, name)(w),
        error_experts_both if both else error_experts,
        "codes and scales that are wrong",
        0,
        WEIGHTS_CHECKED,
        moved=partial(moved_experts, both=both),
        timed=WEIGHTS,
        small=(4, 256, 512),
        peers=[Peer("eager torch", partial(eager_experts, both=both), "any", alike=False)],
        share=0.8,
    )


ENTRIES = [
    tokens_entry("quantize_tokens", torch.bfloat16, TIMED),
    tokens_entry("quantize_tokens", torch.float32),
    tokens_entry("quantize_tokens_both", torch.bfloat16, TIMED),
    tokens_entry("quantize_tokens_both", torch.float32),
    Entry(
        "requantize_tokens",
        "FP8",
        make_cached,
        lambda q, offsets: grouped_quantize.requantize_tokens(q, offsets),
        error_tokens,
        "codes and scales that are wrong",
        0,
        CHECKED,
        moved=partial(moved_tokens, width=1, both=False),
        timed=TIMED,
        small=(512, 512, 4),
        peers=[Peer("eager torch", eager_cached, "any", alike=False)],
        share=0.8,
        kernel="quantize_tokens_triton",
    ),
    experts_entry("quantize_experts"),
    experts_entry("quantize_experts_both"),
]
