"""Run by test_gemm.py and test_grouped_gemm.py in a process of its own, under TRITON_INTERPRET=1.

The GEMMs in every launch shape against their references. Three programs walk over all tiles, outputs are
poisoned before, scales moved by many powers of two, and sizes ragged: a tile, a scale or a row in the wrong
place shows.
"""

import itertools
import sys
from unittest import mock

import torch

from kernels.formats.grouped_quantize import QuantizedExperts, token_groups
from kernels.formats.quantize import BLOCKS, TILES, Quantized, quantize_reference
from kernels.gemms import gemm, grouped_gemm
from kernels.gemms.gemm_tiles import TILE_CONFIGS
from kernels.metrics import relative_error
from tests.kernels.guard import guarded

# M, N, K. 1100 rows are more than one band of output tiles; 385 columns are tiles of both kinds, the wide
# piece first and the narrow one first, and one that is cut off.
SHAPES = ((1, 1, 1), (7, 129, 200), (129, 385, 257), (130, 250, 128), (1100, 70, 128))


def random_operand(
    shape: tuple[int, int], generator: torch.Generator, block: tuple[int, int] = TILES
) -> Quantized:
    """An operand whose scales are moved by many powers of two, so that one in the wrong place cannot hide."""
    q = quantize_reference(torch.randn(shape, generator=generator), block)
    moved = q.scales * 2.0 ** torch.randint(-9, 9, q.scales.shape, generator=generator)
    return Quantized(q.codes, moved, block)


def poisoned(*arguments, **options) -> torch.Tensor:
    """In place of `torch.empty`: what a kernel leaves unwritten shows as NaN."""
    return torch.full(*arguments, torch.nan, **options)


def backwards(tile, tiles_m, tiles_n, BAND):
    """In place of `output_tile`: tiles from last to first. A tile that writes past its expert then shows."""
    return tiles_m - 1 - tile // tiles_n, tiles_n - 1 - tile % tiles_n


def check_gemm(generator: torch.Generator) -> None:
    for (m, n, k), block in itertools.product(SHAPES, (BLOCKS, TILES)):
        a, b = random_operand((m, k), generator), random_operand((n, k), generator, block)
        expected = gemm.gemm_reference(a, b).double()
        for config in (None, *gemm.configs_for(block)):
            with mock.patch("torch.empty", poisoned):
                found = gemm.gemm_triton(a, b, config=config)
            assert found.is_contiguous()
            error = relative_error(found, expected)
            assert error < 1e-6, (m, n, k, block, config, error)


def check_gemm_add(generator: torch.Generator) -> None:
    for (m, n, k), block in itertools.product(SHAPES, (BLOCKS, TILES)):
        a, b = random_operand((m, k), generator), random_operand((n, k), generator, block)
        before = torch.randn(m, n, generator=generator)
        expected = before.clone()
        gemm.gemm_add_reference(a, b, expected)
        for config in (None, *gemm.configs_for(block, add=True)):
            found = before.clone()
            gemm.gemm_add_triton(a, b, found, config)
            error = relative_error(found, expected.double())
            assert error < 1e-6, (m, n, k, block, config, error)


def check_odd_addresses() -> None:
    """Codes that TMA cannot read where they lie are multiplied all the same."""
    storage = torch.zeros(3 * 128 + 1, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = storage[1:].view(3, 128)
    codes.view(torch.uint8).copy_(torch.arange(384).remainder(120).view(3, 128))
    a = Quantized(codes, torch.tensor([[1.0], [2.0], [4.0]]), TILES)
    assert codes.data_ptr() % 16
    assert relative_error(gemm.gemm_triton(a, a), gemm.gemm_reference(a, a).double()) < 1e-6
    weight = quantize_reference(
        torch.ones(256, 1), BLOCKS
    ).transpose()  # its rows are 1 apart, and there is one
    assert weight.codes.stride() == (1, 1)
    row = quantize_reference(torch.ones(1, 256), TILES)
    assert abs(gemm.gemm_triton(row, weight).item() - 256) < 1e-3


def group_sizes() -> list[list[int]]:
    """Tokens of each expert; the last list has more experts than the shortest vector of offsets holds."""
    many = [size % 3 for size in range(40)]
    return [[1], [0, 1, 7, 129, 0, 64, 65, 0], [0, 0, 300, 256], [128, 0], many]


def random_experts(count: int, n: int, k: int, generator: torch.Generator) -> QuantizedExperts:
    parts = [random_operand((n, k), generator, BLOCKS) for _ in range(count)]
    codes = torch.stack([part.codes.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return QuantizedExperts(codes, torch.stack([part.scales for part in parts]))


def check_grouped_gemm(generator: torch.Generator) -> None:
    # `rests` are rows past the last expert. 1100 rows are more than one band of output tiles.
    rests = (0, 5, 140, 0, 1)
    shapes = ((129, 200, torch.int32), (296, 128, torch.int64))
    pairs = enumerate(zip(group_sizes(), rests, strict=True))
    cases = [(sizes, rest, *shapes[index % 2]) for index, (sizes, rest) in pairs]
    for sizes, rest, n, k, dtype in (*cases, ([500, 600], 0, 130, 128, torch.int64)):
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=dtype)
        a = random_operand((sum(sizes) + rest, k), generator)
        b = random_experts(len(sizes), n, k, generator)
        expected = grouped_gemm.grouped_gemm_reference(a, b, offsets).double()
        for config, order in (
            (None, grouped_gemm.output_tile),
            *((config, backwards) for config in grouped_gemm.CONFIGS),
        ):
            with mock.patch("torch.empty", poisoned), mock.patch.object(grouped_gemm, "output_tile", order):
                found = grouped_gemm.grouped_gemm_triton(a, b, offsets, config=config)
            error = relative_error(found, expected)
            assert error < 1e-6, (sizes, rest, n, k, config, error)


def check_grouped_gemm_is_gemm(generator: torch.Generator) -> None:
    """Bit for bit one `gemm` for each expert, whatever the launch shapes.

    Codes are small integers: their products sum exactly in any order, and only that in which groups are
    promoted shows.
    """
    sizes, n, k = [3, 130, 0, 64], 200, 300
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    a, b = random_operand((sum(sizes), k), generator), random_experts(len(sizes), n, k, generator)
    for codes in (a.codes, b.codes):
        codes.copy_(torch.randint(-8, 9, codes.shape, generator=generator).float().to(codes.dtype))
    for config in grouped_gemm.CONFIGS:
        found = grouped_gemm.grouped_gemm_triton(a, b, offsets, config=config)
        for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            rows = Quantized(a.codes[begin:end].contiguous(), a.scales[begin:end].contiguous(), TILES)
            assert torch.equal(found[begin:end], gemm.gemm_triton(rows, b.expert(expert))), (config, expert)


def check_offsets_past_the_end(generator: torch.Generator) -> None:
    """Nothing checks offsets on a GPU: an expert that reaches past the last token has what there is."""
    for sizes, tokens in (([100, 130], 150), ([130, 3], 70)):
        offsets = torch.tensor([0, *itertools.accumulate(sizes)])
        a, b = random_operand((tokens, 128), generator), random_experts(len(sizes), 130, 128, generator)
        expected = grouped_gemm.grouped_gemm_reference(a, b, offsets.clamp(max=tokens)).double()
        for config in grouped_gemm.CONFIGS:
            with guarded(), mock.patch.object(grouped_gemm, "check_offsets"):
                found = grouped_gemm.grouped_gemm_triton(a, b, offsets, config=config)
            assert relative_error(found, expected) < 1e-6, (sizes, tokens, config)


def check_grouped_gemm_k(generator: torch.Generator) -> None:
    for sizes, (n, k), dtype in zip(
        group_sizes(),
        ((1, 1), (70, 129), (65, 300), (129, 128), (10, 20)),
        (torch.int32, torch.int64, torch.int32, torch.int64, torch.int32),
        strict=True,
    ):
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=dtype)
        columns = 128 * token_groups(sum(sizes), len(sizes))
        a, b = random_operand((n, columns), generator), random_operand((k, columns), generator)
        before = torch.randn(len(sizes), n, k, generator=generator)
        for expert, size in enumerate(sizes):
            if size == 0:
                before[expert] = -0.0
        expected = before.clone()
        grouped_gemm.grouped_gemm_k_reference(a, b, offsets, expected)
        for config in (None, *TILE_CONFIGS):
            found = before.clone()
            grouped_gemm.grouped_gemm_k_triton(a, b, offsets, found, config)
            for expert, size in enumerate(sizes):
                if size == 0:
                    assert found[expert].signbit().all(), (sizes, expert)  # not even 0 was added
                else:
                    error = relative_error(found[expert], expected[expert].double())
                    assert error < 1e-6, (sizes, n, k, config, expert, error)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    if sys.argv[1] == "gemm":
        check_gemm(generator)
        check_gemm_add(generator)
        check_odd_addresses()
    else:
        check_grouped_gemm(generator)
        check_grouped_gemm_is_gemm(generator)
        check_offsets_past_the_end(generator)
        check_grouped_gemm_k(generator)
    print("interpreted kernels agree")


if __name__ == "__main__":
    main()
