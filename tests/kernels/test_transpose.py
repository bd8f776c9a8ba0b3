"""Quantisation along both sides, along tokens of experts, and in transposed blocks, against the oracle."""

import itertools

import numpy as np
import pytest
import torch

from kernels.formats.e5m6 import quantize_e5m6, unpack
from kernels.formats.grouped_quantize import (
    quantize_experts,
    quantize_experts_both,
    quantize_tokens,
    quantize_tokens_both,
    requantize_tokens,
    token_groups,
)
from kernels.formats.quantize import BLOCKS, TILES, Quantized, dequantize, quantize_blocks, quantize_tiles
from kernels.formats.square import experts_range
from kernels.formats.transpose import quantize_blocks_both, quantize_both, requantize_transpose
from tests.kernels.interpreter import needs_interpreter, run_interpreted
from tests.kernels.oracle import oracle, spread

SHAPES = [(1, 1), (7, 129), (129, 7), (128, 256), (300, 200)]
SIZES = [[5], [0, 1, 7, 129, 0, 128, 3, 0], [0, 0, 0], [64, 300]]
BAD = [torch.nan, -torch.nan, torch.inf, -torch.inf]


def matrix(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of many sizes, zeros of both signs and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    x *= 4.0 ** torch.randint(-20, 20, (*shape[:-1], 1), generator=generator)
    x *= 4.0 ** torch.randint(-20, 20, (shape[-1],), generator=generator)
    for special in (0.0, -0.0, 2.0**-130):
        x[torch.rand(shape, generator=generator) < 0.03] = special
    x[..., :1, :] *= 2.0**-100
    return x.to(dtype)


def is_oracle(
    found: Quantized, values: np.ndarray, power_of_two: bool, block: tuple[int, int] = TILES
) -> None:
    codes, scales = oracle(values, block, power_of_two)
    np.testing.assert_array_equal(found.scales.double().numpy(), scales)
    np.testing.assert_array_equal(found.codes.view(torch.uint8).numpy(), codes)


def decoded(q: Quantized) -> np.ndarray:
    return spread(q.codes.view(torch.uint8).numpy(), q.scales.double().numpy(), q.block)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_are_those_of_the_oracle(shape, dtype, power_of_two) -> None:
    x = matrix(shape, dtype)
    for source in (x, x.t().contiguous().t(), torch.stack([x, x], dim=1)[:, 1]):
        rows, columns = quantize_both(source, power_of_two=power_of_two)
        values = source.double().numpy()
        is_oracle(rows, values, power_of_two)
        is_oracle(columns, values.T, power_of_two)
        rows, columns = quantize_blocks_both(source, power_of_two=power_of_two)
        is_oracle(rows, values, power_of_two, BLOCKS)
        is_oracle(columns, values.T, power_of_two, BLOCKS)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_requantised_tiles_are_those_of_the_oracle(shape, power_of_two) -> None:
    q = quantize_tiles(matrix(shape))
    is_oracle(requantize_transpose(q, power_of_two=power_of_two), decoded(q).T, power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_requantised_e5m6_is_that_of_the_oracle(shape, power_of_two) -> None:
    q = quantize_e5m6(matrix(shape))
    # A code is the upper part of an FP16.
    values = (unpack(q.packed, q.cols).numpy() << 4).astype(np.uint16).view(np.float16).astype(np.float64)
    scales = np.repeat(q.scales.double().numpy(), 128, axis=1)[:, : q.cols]
    values = (values * scales).astype(np.float32).astype(np.float64)
    is_oracle(requantize_transpose(q, power_of_two=power_of_two), values.T, power_of_two)


def test_powers_of_two_survive_requantisation() -> None:
    """Within the range of a tile, the second rounding changes no value."""
    q = quantize_tiles(torch.randn(256, 200, generator=torch.Generator().manual_seed(1)), power_of_two=True)
    again = requantize_transpose(q, power_of_two=True)
    values, changed = dequantize(q).t(), dequantize(again).t() != dequantize(q)
    amax = values.view(200, 2, 128).abs().amax(dim=2).repeat_interleave(128, dim=1).t()
    assert not changed[dequantize(q).abs() > amax / 448 / 32].any()


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_spoils_its_tile_on_each_side(bad) -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    clean = quantize_both(x)
    x[150, 140] = bad
    for side, (found, expected) in enumerate(zip(quantize_both(x), clean, strict=True)):
        spoiled = torch.zeros(found.shape, dtype=torch.bool)
        spoiled[(150, slice(128, 256)) if side == 0 else (140, slice(128, 200))] = True
        codes = found.codes.view(torch.uint8)
        assert (codes[spoiled] == 0x7F).all()
        assert torch.equal(codes[~spoiled], expected.codes.view(torch.uint8)[~spoiled])
        assert int(found.scales.isnan().sum()) == 1
    for cached in (quantize_tiles(x), quantize_e5m6(x)):
        found = requantize_transpose(cached)
        # The tile in the cache is NaN as a whole: so is every channel of it, over 128 tokens.
        assert torch.equal(found.scales.isnan().nonzero(), torch.tensor([[c, 1] for c in range(128, 256)]))
        assert (found.codes[128:256, 128:].view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("shape", [(0, 200), (5, 0), (0, 0)])
def test_empty_matrices(shape) -> None:
    x = torch.empty(shape)
    for function in (quantize_both, quantize_blocks_both):
        rows, columns = function(x)
        assert (rows.shape, columns.shape) == (shape, shape[::-1])
    for cached in (quantize_tiles(x), quantize_e5m6(x)):
        assert requantize_transpose(cached).shape == shape[::-1]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("experts", "n", "k"), [(1, 1, 1), (3, 130, 200), (2, 256, 128), (4, 7, 129)])
def test_experts_are_quantised_one_by_one(experts, n, k, power_of_two) -> None:
    w = matrix((experts, n, k))
    for source in (w, w.mT.contiguous().mT):
        rows, columns = quantize_experts_both(source, power_of_two=power_of_two)
        alone = quantize_experts(source, power_of_two=power_of_two)
        for expert in range(experts):
            values = w[expert].double().numpy()
            is_oracle(rows.expert(expert), values, power_of_two, BLOCKS)
            is_oracle(alone.expert(expert), values, power_of_two, BLOCKS)
            is_oracle(columns.expert(expert), values.T, power_of_two, BLOCKS)


def tokens_oracle(values: np.ndarray, sizes: list[int], power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of each expert's transposed tokens, from the start of a group of 128 each."""
    groups = token_groups(values.shape[0], len(sizes))
    codes = np.zeros((values.shape[1], 128 * groups), dtype=np.uint8)
    scales = np.ones((values.shape[1], groups))
    token = group = 0
    for size in sizes:
        if size > 0:
            found = oracle(values[token : token + size].T, TILES, power_of_two)
            codes[:, 128 * group : 128 * group + size] = found[0]
            scales[:, group : group + found[1].shape[1]] = found[1]
            group += found[1].shape[1]
        token += size
    return codes, scales


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rest", [0, 3, 200])
@pytest.mark.parametrize("sizes", SIZES)
def test_tokens_of_experts_are_those_of_the_oracle(sizes, rest, power_of_two) -> None:
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    x = matrix((sum(sizes) + rest, 130))
    x[sum(sizes) :] = torch.nan  # rows of no expert: never read
    q = quantize_tiles(x)
    rows, columns = quantize_tokens_both(x, offsets, power_of_two=power_of_two)
    zeroed = x.nan_to_num(0.0).double().numpy()
    is_oracle(rows, zeroed, power_of_two)
    for found, values in (
        (columns, zeroed),
        (quantize_tokens(x, offsets.int(), power_of_two=power_of_two), zeroed),
        (requantize_tokens(q, offsets, power_of_two=power_of_two), decoded(q)),
    ):
        codes, scales = tokens_oracle(values, sizes, power_of_two)
        np.testing.assert_array_equal(found.codes.view(torch.uint8).numpy(), codes)
        np.testing.assert_array_equal(found.scales.double().numpy(), scales)


def test_a_spoiled_token_stays_with_its_expert() -> None:
    x = torch.randn(100, 130, generator=torch.Generator().manual_seed(3))
    x[40, 3] = torch.nan
    rows, columns = quantize_tokens_both(x, torch.tensor([0, 40, 41, 100]))
    assert columns.scales.isnan().nonzero().tolist() == [[3, 1]]
    assert rows.scales.isnan().nonzero().tolist() == [[40, 0]]


def test_offsets_of_all_experts_fit_the_range_that_a_program_reads() -> None:
    counts = (0, 1, 32, 33, 64, 65, 128, 256, 257)
    assert [experts_range(count) for count in counts] == [32, 32, 32, 64, 64, 256, 256, 256, 512]


def test_errors_name_the_fault() -> None:
    blocks, offsets = quantize_blocks(torch.ones(4, 4)), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"requantize_transpose.*q\.transpose\(\)"):
        requantize_transpose(blocks)
    with pytest.raises(ValueError, match=r"requantize_tokens.*quantize_tiles"):
        requantize_tokens(blocks, offsets)
    for function in (quantize_both, quantize_blocks_both):
        with pytest.raises(ValueError, match=rf"{function.__name__}.*\(4,\)"):
            function(torch.ones(4))
        with pytest.raises(TypeError, match=rf"{function.__name__}.*float64"):
            function(torch.ones(4, 4, dtype=torch.float64))
    for function in (quantize_tokens, quantize_tokens_both):
        with pytest.raises(ValueError, match=rf"{function.__name__}.*\[tokens, channels\]"):
            function(torch.ones(4), offsets)
        with pytest.raises(TypeError, match=rf"{function.__name__}.*float16"):
            function(torch.ones(4, 4).half(), offsets)
        with pytest.raises(ValueError, match=rf"{function.__name__}.*at most the 3 tokens"):
            function(torch.ones(3, 4), offsets)
    for function in (quantize_experts, quantize_experts_both):
        with pytest.raises(ValueError, match=rf"{function.__name__}.*\[experts, N, K\]"):
            function(torch.ones(4, 4))
        with pytest.raises(TypeError, match=rf"{function.__name__}.*int64"):
            function(torch.ones(1, 4, 4, dtype=torch.int64))


@needs_interpreter
@pytest.mark.parametrize("check", ["values", "cached", "experts", "tokens"])
def test_the_kernel_agrees_with_its_references(check) -> None:
    run_interpreted("interpreted_transpose.py", check)
