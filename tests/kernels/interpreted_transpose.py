"""Run by test_transpose.py in a process of its own, under TRITON_INTERPRET=1.

Outputs are poisoned before the kernels run, and codes and scales compared with the references bit for bit.
"""

import itertools
import sys
from unittest import mock

import torch

from kernels.formats import grouped_quantize, transpose
from kernels.formats.e5m6 import quantize_e5m6_reference
from kernels.formats.quantize import (
    BLOCKS,
    TILES,
    Quantized,
    quantize_blocks_triton,
    quantize_reference,
    quantize_tiles_triton,
)
from tests.kernels.exact_casts import exact_casts

SHAPES = ((1, 1), (7, 129), (129, 144), (200, 48), (160, 144), (0, 5), (5, 0))
BAD = (torch.nan, -torch.nan, torch.inf, -torch.inf)
# Tokens of each expert, then rows of no expert.
SIZES = (([1], 0), ([0, 1, 7, 129, 0, 128, 3, 0], 5), ([0, 0], 0), ([300], 140), ([0, 40, 0], 1), ([0], 200))
Pairs = tuple[torch.Tensor, torch.Tensor]


def poisoned(*arguments, **options) -> torch.Tensor:
    """In place of `torch.empty`: what a kernel leaves unwritten looks like nothing that it writes."""
    with mock.patch("torch.empty", EMPTY):
        made = torch.zeros(*arguments, **options)
    return made.view(torch.uint8).fill_(0x5A).view(made.dtype)


EMPTY = torch.empty


def same(found: Quantized, expected: Quantized, *what: object) -> None:
    assert found.codes.shape == expected.codes.shape, what
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8)), ("codes", *what)
    assert torch.equal(found.scales.isnan(), expected.scales.isnan()), ("NaN scales", *what)
    assert torch.equal(found.scales.nan_to_num(7.0), expected.scales.nan_to_num(7.0)), ("scales", *what)


def matrix(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Values of many sizes with zeros of both signs among them: a scale in the wrong place cannot hide."""
    x = torch.randn(shape, generator=generator)
    x *= 4.0 ** torch.randint(-8, 8, (shape[0], 1), generator=generator)
    x *= 4.0 ** torch.randint(-8, 8, (1, shape[1]), generator=generator)
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    x[torch.rand(shape, generator=generator) < 0.05] = -0.0
    return x


def spoiled(x: torch.Tensor) -> torch.Tensor:
    """A row of zeros and one of tiny numbers, and four values that are not finite."""
    x = x.clone()
    if x.numel() > 1000:
        x[3], x[:, 5], x[6] = 0, 0, 2.0**-130
        for place, bad in enumerate(BAD):
            x[17 * place + 20, (29 * place + 20) % x.shape[1]] = bad
    return x


def check_values(generator: torch.Generator) -> None:
    for shape, power_of_two in itertools.product(SHAPES, (False, True)):
        x = matrix(shape, generator)
        # The interpreter misreads subnormal BF16 numbers, so these stay in FP32.
        others = (x.bfloat16(), x.t().contiguous().t(), x[:, :1].expand(shape))
        for source in (spoiled(x),) if power_of_two else (spoiled(x), *others):
            found = transpose.quantize_both_triton(source, power_of_two=power_of_two)
            expected = transpose.quantize_both_reference(source, power_of_two=power_of_two)
            same(found[0], expected[0], "both", shape)
            same(found[1], expected[1], "both, transposed", shape)
            same(found[1], quantize_reference(source.t(), TILES, power_of_two=power_of_two), shape)
            same(quantize_tiles_triton(source.t(), power_of_two=power_of_two), expected[1], "view", shape)
            found = transpose.quantize_blocks_both_triton(source, power_of_two=power_of_two)
            blocks = quantize_reference(source, BLOCKS, power_of_two=power_of_two)
            same(found[0], blocks, "blocks", shape)
            same(found[1], blocks.transpose(), "blocks, transposed", shape)
            same(quantize_blocks_triton(source, power_of_two=power_of_two), blocks, "blocks alone", shape)


def check_cached(generator: torch.Generator) -> None:
    for shape, power_of_two in itertools.product(SHAPES, (False, True)):
        x = spoiled(matrix(shape, generator))
        for q in (quantize_reference(x, TILES, power_of_two=power_of_two), quantize_e5m6_reference(x)):
            found = transpose.requantize_transpose_triton(q, power_of_two=power_of_two)
            expected = transpose.requantize_transpose_reference(q, power_of_two=power_of_two)
            same(found, expected, type(q), shape)


def check_experts(generator: torch.Generator) -> None:
    for experts, n, k in ((1, 1, 1), (3, 130, 70), (2, 128, 48), (3, 0, 4), (2, 3, 0)):
        w = matrix((experts * n, k), generator).view(experts, n, k)
        for source in (w, w.mT.contiguous().mT, w.transpose(0, 1).contiguous().transpose(0, 1)):
            rows, columns = grouped_quantize.quantize_experts_both_triton(source)
            expected = grouped_quantize.quantize_experts_reference(source)
            alone = grouped_quantize.quantize_experts_triton(source)
            assert (rows.shape, columns.shape) == ((experts, n, k), (experts, k, n))
            for expert in range(experts):
                same(rows.expert(expert), expected.expert(expert), "experts", w.shape)
                same(alone.expert(expert), expected.expert(expert), "experts alone", w.shape)
                same(columns.expert(expert), expected.expert(expert).transpose(), "transposed", w.shape)


def check_tokens(generator: torch.Generator) -> None:
    many = [size % 3 for size in range(40)]  # more experts than the shortest vector of offsets holds
    for (sizes, rest), (channels, dtype) in itertools.product(
        (*SIZES, (many, 0)), ((48, torch.int64), (130, torch.int32))
    ):
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=dtype)
        x = matrix((sum(sizes) + rest, channels), generator)
        if rest:
            x[sum(sizes) :] = torch.nan  # rows of no expert are never read
        q = quantize_reference(x, TILES)
        for power_of_two in (False, True) if rest else (False,):
            expected = grouped_quantize.quantize_tokens_both_reference(x, offsets, power_of_two=power_of_two)
            found = grouped_quantize.quantize_tokens_both_triton(x, offsets, power_of_two=power_of_two)
            same(found[0], expected[0], "rows", sizes)
            same(found[1], expected[1], "both", sizes)
            found = grouped_quantize.quantize_tokens_triton(x, offsets, power_of_two=power_of_two)
            same(found, expected[1], "tokens", sizes)
            found = grouped_quantize.quantize_tokens_triton(q, offsets, power_of_two=power_of_two)
            expected = grouped_quantize.quantize_tokens_reference(q, offsets, power_of_two=power_of_two)
            same(found, expected, "cached tokens", sizes)


CHECKS = {"values": check_values, "cached": check_cached, "experts": check_experts, "tokens": check_tokens}

if __name__ == "__main__":
    with exact_casts(), mock.patch("torch.empty", poisoned):
        CHECKS[sys.argv[1]](torch.Generator().manual_seed(0))
    print("interpreted kernels agree")
