"""The FP8 GEMMs on a GPU, in every launch shape, against float64 on the dequantised operands."""

import itertools

import pytest
import torch

from kernels.formats.grouped_quantize import QuantizedExperts, group_starts, quantize_experts, quantize_tokens
from kernels.formats.quantize import BLOCKS, TILES, Quantized, dequantize, quantize_blocks, quantize_tiles
from kernels.gemms.gemm import configs_for, gemm, gemm_add, gemm_add_triton, gemm_triton
from kernels.gemms.gemm_tiles import TILE_CONFIGS, Config, fitting
from kernels.gemms.grouped_gemm import (
    CONFIGS,
    grouped_gemm,
    grouped_gemm_k,
    grouped_gemm_k_triton,
    grouped_gemm_triton,
)
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "needs a GPU with E4M3 instructions (compute capability 8.9)"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs here")]

# M, N, K of the published model's layers at 4096 tokens, and ragged ones.
MODEL = ((4096, 1536, 7168), (4096, 24576, 1536), (4096, 576, 7168), (4096, 32768, 512), (4096, 7168, 16384))
RAGGED = ((1, 1, 1), (1, 7168, 128), (7, 129, 200), (129, 7, 385), (1500, 520, 1024), (300, 385, 7000))
# Tokens of each expert.
SIZES = ([5], [0, 1, 7, 129, 0, 128, 3, 0], [0, 0, 0], [700, 40, 300], [1000, 0, 2048, 1])


def on_gpu(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values whose size differs between rows and groups of 128, so that no misplaced scale can hide."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cuda")
    x *= 4.0 ** (torch.arange(shape[-1], device="cuda") // 128 % 5)
    return x * 2.0 ** (torch.arange(shape[-2], device="cuda")[:, None] % 7)


def product64(a: Quantized, b: Quantized) -> torch.Tensor:
    return dequantize(a).double() @ dequantize(b).double().t()


def shapes_of(configs: tuple[Config, ...]) -> list[Config]:
    """The launch shapes that this GPU has shared memory for."""
    return fitting(configs, torch.float32, torch.device("cuda"))


def poison() -> None:
    """Free memory that holds NaN, for the allocator to hand out: what a kernel leaves unwritten shows."""
    torch.full((2**26,), torch.nan, device="cuda")


@pytest.mark.parametrize(("m", "n", "k"), MODEL)
@pytest.mark.parametrize("block", [TILES, BLOCKS])
def test_layers_of_the_model(block, m, n, k) -> None:
    a = quantize_tiles(on_gpu((m, k), 1))
    b = (quantize_tiles if block == TILES else quantize_blocks)(on_gpu((n, k), 2))
    exact = product64(a, b)
    poison()
    assert relative_error(gemm(a, b), exact) < MAX_ERROR_FP32
    assert relative_error(gemm(a, b, torch.bfloat16), exact) < MAX_ERROR_BF16


@pytest.mark.parametrize(("m", "n", "k"), RAGGED)
@pytest.mark.parametrize("block", [TILES, BLOCKS])
def test_every_launch_shape_at_ragged_sizes(block, m, n, k) -> None:
    a = quantize_tiles(on_gpu((m, k), 1))
    b = (quantize_tiles if block == TILES else quantize_blocks)(on_gpu((n, k), 2))
    exact = product64(a, b)
    results = []
    for config in shapes_of(configs_for(block)):
        poison()
        results.append(gemm_triton(a, b, config=config))
        assert relative_error(results[-1], exact) < MAX_ERROR_FP32, config
        assert relative_error(gemm_triton(a, b, torch.bfloat16, config), exact) < MAX_ERROR_BF16, config
    for found in results:  # the order of the sum does not depend on the tiles
        assert torch.equal(found, results[0])


@pytest.mark.parametrize(("m", "n", "k"), [*RAGGED, (7168, 2048, 4096), (576, 7168, 4096)])
@pytest.mark.parametrize("block", [TILES, BLOCKS])
def test_sums_are_added_once(block, m, n, k) -> None:
    a = quantize_tiles(on_gpu((m, k), 1))
    b = (quantize_tiles if block == TILES else quantize_blocks)(on_gpu((n, k), 2))
    before = torch.randn(m, n, device="cuda")
    expected = before + gemm(a, b)
    for config in (None, *shapes_of(configs_for(block, add=True))):
        found = before.clone()
        if config is None:
            gemm_add(a, b, found)
        else:
            gemm_add_triton(a, b, found, config)
        assert torch.equal(found, expected), config


def test_a_spoiled_tile_surfaces_where_it_is_used() -> None:
    x, w = on_gpu((300, 512), 1), on_gpu((400, 512), 2)
    x[7, 200], w[390, 3] = torch.nan, torch.inf
    found = gemm(quantize_tiles(x), quantize_blocks(w))
    assert found[7].isnan().all()
    assert found[:, 384:].isnan().all()
    found[7], found[:, 384:] = 0, 0
    assert found.isfinite().all()


def experts_on_gpu(
    sizes: list[int], rest: int, n: int, k: int
) -> tuple[Quantized, QuantizedExperts, torch.Tensor]:
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], device="cuda")
    a = quantize_tiles(on_gpu((sum(sizes) + rest, k), 3))
    return a, quantize_experts(on_gpu((len(sizes), n, k), 4)), offsets


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("n", "k"), [(129, 200), (576, 1024), (1, 128)])
def test_grouped_rows_equal_one_gemm_for_each_expert(n, k, sizes) -> None:
    rest = 150
    a, b, offsets = experts_on_gpu(sizes, rest, n, k)
    bounds = offsets.tolist()
    for config, dtype in itertools.product((None, *shapes_of(CONFIGS)), (torch.float32, torch.bfloat16)):
        poison()
        if config is None:
            found = grouped_gemm(a, b, offsets, dtype)
        else:
            found = grouped_gemm_triton(a, b, offsets, dtype, config)
        for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
            rows = Quantized(a.codes[begin:end].contiguous(), a.scales[begin:end].contiguous(), TILES)
            assert torch.equal(found[begin:end], gemm(rows, b.expert(expert), dtype)), (config, expert)
        assert torch.equal(found[bounds[-1] :], torch.zeros_like(found[bounds[-1] :])), config


@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (7168, 2048)])
def test_experts_of_the_model(n, k) -> None:
    sizes = [4096, 3000, 0, 1, 128, 5000, 127, 4000]
    a, b, offsets = experts_on_gpu(sizes, 60, n, k)
    found = grouped_gemm(a, b, offsets, torch.bfloat16)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin < end:
            rows = Quantized(a.codes[begin:end].contiguous(), a.scales[begin:end].contiguous(), TILES)
            exact = product64(rows, b.expert(expert))
            assert relative_error(found[begin:end], exact) < MAX_ERROR_BF16, expert


@pytest.mark.parametrize("sizes", [*SIZES, [4096, 0, 3000, 1]])
@pytest.mark.parametrize(("n", "k"), [(129, 200), (300, 576)])
def test_grouped_sums_equal_one_gemm_for_each_expert(n, k, sizes) -> None:
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], device="cuda")
    a = quantize_tokens(on_gpu((sum(sizes) + 9, n), 5), offsets)
    b = quantize_tokens(on_gpu((sum(sizes) + 9, k), 6), offsets)
    before = torch.randn(len(sizes), n, k, device="cuda")
    starts = group_starts(offsets).tolist()
    for config in (None, *shapes_of(TILE_CONFIGS)):
        found = before.clone()
        if config is None:
            grouped_gemm_k(a, b, offsets, found)
        else:
            grouped_gemm_k_triton(a, b, offsets, found, config)
        for expert, (begin, end) in enumerate(itertools.pairwise(starts)):
            parts = [
                Quantized(
                    q.codes[:, begin * 128 : end * 128].contiguous(),
                    q.scales[:, begin:end].contiguous(),
                    TILES,
                )
                for q in (a, b)
            ]
            expected = before[expert] + gemm(*parts) if begin < end else before[expert]
            assert torch.equal(found[expert], expected), (config, expert)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu() -> None:
    a, b, offsets = experts_on_gpu([30, 0, 160], 10, 200, 256)
    tokens = quantize_tokens(on_gpu((190, 200), 5), offsets)
    out, gradient = torch.zeros(3, 200, 200, device="cuda"), torch.zeros(200, 200, device="cuda")

    def step() -> None:
        grouped_gemm(a, b, offsets, torch.bfloat16)
        grouped_gemm_k(tokens, tokens, offsets, out)
        gemm_add(tokens, tokens, gradient)

    step()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_results_do_not_change_from_run_to_run() -> None:
    a, b, offsets = experts_on_gpu([700, 40, 300], 0, 576, 1024)
    first = grouped_gemm(a, b, offsets)
    for _ in range(5):
        assert torch.equal(grouped_gemm(a, b, offsets), first)
