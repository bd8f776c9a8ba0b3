"""The FP8 GEMM reference against float64 on the dequantised operands."""

from unittest import mock

import numpy as np
import pytest
import torch

from kernels.formats.quantize import BLOCKS, TILES, Quantized, quantize_blocks, quantize_tiles
from kernels.gemms import gemm_tiles
from kernels.gemms.gemm import configs_for, gemm, gemm_add
from kernels.gemms.gemm_tiles import BLOCK_CONFIGS, LARGE, MEDIUM, SMALL, TILE_CONFIGS, choose
from kernels.metrics import MAX_ERROR_BF16, relative_error
from tests.kernels.interpreter import needs_interpreter, run_interpreted

QUANTIZERS = {TILES: quantize_tiles, BLOCKS: quantize_blocks}


def values64(q: Quantized) -> torch.Tensor:
    """The operand in float64, each scale spread over its block by numpy."""
    scales = q.scales.double().numpy()
    for axis in (0, 1):
        scales = np.repeat(scales, q.block[axis], axis=axis)
    return q.codes.double() * torch.from_numpy(scales[: q.shape[0], : q.shape[1]])


def operands(m: int, n: int, k: int, block: tuple[int, int], seed: int = 0) -> tuple[Quantized, Quantized]:
    """Operands whose blocks differ much in size, so that a scale in the wrong place cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=generator) * torch.randn(m, k, generator=generator).exp2()
    b = torch.randn(n, k, generator=generator)
    a *= 4.0 ** (torch.arange(k) // 128 + torch.arange(m)[:, None] % 5)
    b *= 3.0 ** (torch.arange(n)[:, None] // 128 - torch.arange(k) // 128)
    return quantize_tiles(a), QUANTIZERS[block](b)


@pytest.mark.parametrize("block", [TILES, BLOCKS])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 256, 128), (7, 129, 200), (129, 7, 385), (64, 300, 1024), (130, 128, 127)],
)
def test_error_against_float64(m, n, k, block) -> None:
    a, b = operands(m, n, k, block)
    exact = values64(a) @ values64(b).t()
    found = gemm(a, b)
    assert (found.shape, found.dtype) == ((m, n), torch.float32)
    assert relative_error(found, exact) < 1e-6  # no tensor core on a CPU: only FP32 rounding
    rounded = gemm(a, b, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, exact) < MAX_ERROR_BF16


def test_rows_do_not_touch_each_other() -> None:
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(1))
    b = quantize_blocks(torch.randn(20, 300, generator=torch.Generator().manual_seed(2)))
    plain = gemm(quantize_tiles(x), b)
    x[4] *= 2.0**20
    x[6, 200] = torch.nan
    changed = gemm(quantize_tiles(x), b)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(changed[others], plain[others])
    assert torch.equal(changed[4], plain[4] * 2.0**20)
    assert changed[6].isnan().all()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 128), (5, 0, 128), (3, 4, 0)])
def test_empty_sizes_give_zeros(m, n, k) -> None:
    found = gemm(quantize_tiles(torch.empty(m, k)), quantize_blocks(torch.empty(n, k)))
    assert torch.equal(found, torch.zeros(m, n))


@pytest.mark.parametrize("block", [TILES, BLOCKS])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 129, 200), (130, 128, 512)])
def test_sums_are_added_once(m, n, k, block) -> None:
    a, b = operands(m, n, k, block)
    before = torch.randn(m, n, generator=torch.Generator().manual_seed(4))
    out = before.clone()
    gemm_add(a, b, out)
    assert torch.equal(out, before + gemm(a, b))
    assert relative_error(out, before.double() + values64(a) @ values64(b).t()) < 1e-6


def test_adding_no_products_leaves_the_output_as_it_is() -> None:
    out = torch.full((3, 4), -0.0)
    gemm_add(quantize_tiles(torch.empty(3, 0)), quantize_tiles(torch.empty(4, 0)), out)
    assert out.signbit().all()
    for m, n in ((0, 4), (3, 0)):
        gemm_add(quantize_tiles(torch.ones(m, 128)), quantize_blocks(torch.ones(n, 128)), torch.ones(m, n))


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted_gemm.py", "gemm")


HOPPER = (132, 227 * 1024)  # multiprocessors, bytes of shared memory that a program may use
ADA = (142, 99 * 1024)


def chosen(m, n, configs=BLOCK_CONFIGS, dtype=torch.bfloat16, card=HOPPER) -> gemm_tiles.Config:
    with mock.patch.object(gemm_tiles, "multiprocessors", return_value=card):
        return choose(configs, m, n, dtype, torch.device("cuda"))


@pytest.mark.parametrize(
    ("m", "n", "config"),
    [
        (1, 7168, SMALL),
        (64, 24576, SMALL),
        (65, 1536, SMALL),  # 48 tiles on 132 multiprocessors, and no other shape has as little to load
        (4096, 512, MEDIUM),  # 128 tiles in one round; LARGE has one round too, of larger steps
        (4096, 1536, LARGE),
        (4096, 2048, LARGE),
        (4096, 4096, LARGE),
        (4096, 7168, LARGE),
        (4096, 24576, LARGE),
        (4096, 36864, LARGE),
    ],
)
def test_launch_shape_has_least_to_load(m, n, config) -> None:
    assert chosen(m, n) == config


def test_launch_shapes_fit_their_card_and_their_scales() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert chosen(4096, 7168, dtype=dtype, card=ADA) == SMALL
        assert chosen(7168, 2048, TILE_CONFIGS, dtype) == MEDIUM
    for config in BLOCK_CONFIGS:
        for out_bytes in (2, 4):
            stages = config.stages(out_bytes, HOPPER[1])
            assert gemm_tiles.FEWEST_STAGES <= stages <= config.num_stages
            used = stages * config.step_bytes + config.block_m * config.block_n * out_bytes
            assert config.per_sm * used <= HOPPER[1]
    assert configs_for(BLOCKS) == BLOCK_CONFIGS
    assert configs_for(TILES) == configs_for(BLOCKS, add=True) == TILE_CONFIGS
    assert LARGE not in TILE_CONFIGS


def test_errors_name_the_fault() -> None:
    a, b = quantize_tiles(torch.ones(2, 128)), quantize_blocks(torch.ones(3, 128))
    with pytest.raises(ValueError, match=r"a is quantised in blocks of \(128, 128\)"):
        gemm(b, b)
    with pytest.raises(ValueError, match=r"\(2, 128\).*\(3, 64\)"):
        gemm(a, quantize_blocks(torch.ones(3, 64)))
    with pytest.raises(TypeError, match="float16"):
        gemm(a, b, torch.float16)
    for out, error, message in (
        (torch.zeros(2, 3, dtype=torch.bfloat16), TypeError, "gemm_add: out is torch.bfloat16"),
        (torch.zeros(3, 2), ValueError, r"out has shape \(3, 2\).*need a contiguous \(2, 3\)"),
        (torch.zeros(3, 2).t(), ValueError, r"need a contiguous \(2, 3\)"),
        (torch.zeros(2, 3, device="meta"), ValueError, "out is on meta and a on cpu"),
    ):
        with pytest.raises(error, match=message):
            gemm_add(a, b, out)
