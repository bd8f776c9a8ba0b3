"""The FP8 GEMM reference against float64 on the dequantised operands."""

import numpy as np
import pytest
import torch

from kernels.gemm import LARGE, SMALL, config_for, gemm
from kernels.metrics import MAX_ERROR_BF16, relative_error
from kernels.quantize import BLOCKS, TILES, Quantized, quantize_blocks, quantize_tiles

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


def test_launch_shape_follows_rows_and_scales() -> None:
    assert [config_for(m, BLOCKS) for m in (1, 64, 65)] == [SMALL, SMALL, LARGE]
    assert config_for(4096, TILES) == SMALL


def test_errors_name_the_fault() -> None:
    a, b = quantize_tiles(torch.ones(2, 128)), quantize_blocks(torch.ones(3, 128))
    with pytest.raises(ValueError, match=r"a is quantised in blocks of \(128, 128\)"):
        gemm(b, b)
    with pytest.raises(ValueError, match=r"\(2, 128\).*\(3, 64\)"):
        gemm(a, quantize_blocks(torch.ones(3, 64)))
    with pytest.raises(TypeError, match="float16"):
        gemm(a, b, torch.float16)
