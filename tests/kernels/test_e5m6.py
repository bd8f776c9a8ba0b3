"""E5M6 against a float64 oracle that is built from the definition of the format alone."""

import numpy as np
import pytest
import torch

from kernels.formats.e5m6 import E5M6, dequantize_e5m6, pack, quantize_e5m6, unpack
from kernels.metrics import relative_error


def code_values() -> np.ndarray:
    """The values of codes 0 to 0x7BF (positive and finite): exponent of bias 15, six bits of fraction."""
    code = np.arange(0x7C0)
    exponent, fraction = code >> 6, (code & 63) / 64
    return np.where(exponent == 0, fraction * 2.0**-14, (1 + fraction) * 2.0 ** (exponent - 15.0))


def nearest_code(value: np.ndarray) -> np.ndarray:
    """Codes nearest to finite float64 values of at most 65024, ties to the even code."""
    magnitudes = code_values()
    above = np.searchsorted(magnitudes, np.abs(value))
    below = np.maximum(above - 1, 0)
    up, down = magnitudes[above] - np.abs(value), np.abs(value) - magnitudes[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.where(np.signbit(value), code | 0x800, code)


def oracle(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a finite matrix, tile by tile."""
    x = x.double().numpy()
    scales = np.empty((x.shape[0], -(-x.shape[1] // 128)))
    codes = np.empty(x.shape, dtype=np.int64)
    for i, j in np.ndindex(*scales.shape):
        tile = x[i, j * 128 : (j + 1) * 128]
        exponent = -126
        while 65024 * 2.0**exponent < np.abs(tile).max():
            exponent += 1
        scales[i, j] = 2.0**exponent if tile.any() else 1.0
        codes[i, j * 128 : (j + 1) * 128] = nearest_code(tile / scales[i, j])
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 127), (5, 128), (7, 129), (33, 300)])
def test_codes_and_scales_are_those_of_the_oracle(shape, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Ten decades inside a row: subnormal codes, and values that round to zero, are many.
    sizes = 10.0 ** torch.randint(-10, 1, shape, generator=generator)
    rows = 10.0 ** torch.randint(-25, 30, (shape[0], 1), generator=generator)
    x = (torch.randn(shape, generator=generator) * sizes * rows).to(dtype)
    x[torch.rand(shape, generator=generator) < 0.05] = -0.0
    for source in (x, x.t().contiguous().t()):
        found = quantize_e5m6(source)
        codes, scales = oracle(source)
        assert np.array_equal(found.scales.double().numpy(), scales)
        assert np.array_equal(unpack(found.packed, shape[1]).numpy(), codes)


def test_every_code_survives_and_every_midpoint_rounds_to_even() -> None:
    values = torch.from_numpy(code_values())
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat([torch.nextafter(middle.float(), torch.tensor(side)) for side in (0.0, 1e9)])
    every = torch.cat([values, middle, near.double()]).float()
    every = torch.cat([every, -every])
    x = torch.full((every.numel(), 2), 65024.0)
    x[:, 1] = every
    found = quantize_e5m6(x)
    assert (found.scales == 1).all()
    assert np.array_equal(unpack(found.packed, 2)[:, 1].numpy(), nearest_code(every.double().numpy()))
    exact = x[: len(values)]
    assert torch.equal(dequantize_e5m6(quantize_e5m6(exact)), exact)


def test_the_scale_is_the_smallest_power_of_two_that_fits() -> None:
    top = torch.tensor(65024.0)
    x = torch.stack([top, torch.nextafter(top, 2 * top), 2 * top, torch.tensor(2.0**-126)])[:, None]
    assert quantize_e5m6(x).scales[:, 0].tolist() == [1.0, 2.0, 2.0, 2.0**-126]


@pytest.mark.parametrize("value", [2.0**-149, 3 * 2.0**-140, 2.0**-126, 65024 * 2.0**-126, -(2.0**127)])
def test_the_ends_of_fp32(value) -> None:
    x = torch.tensor([[value]])
    assert dequantize_e5m6(quantize_e5m6(x)).item() == (value if abs(value) >= 2.0**-146 else 0.0)


def test_zeros_keep_their_sign() -> None:
    q = quantize_e5m6(torch.tensor([[0.0, -0.0, -0.0]]))
    assert q.scales.item() == 1
    assert torch.signbit(dequantize_e5m6(q)).tolist() == [[False, True, True]]


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_turn_their_tile_to_nan(bad) -> None:
    x = torch.ones(3, 301)
    x[1, 300] = bad
    q = quantize_e5m6(x)
    assert q.scales.isnan().tolist() == [[False] * 3, [False, False, True], [False] * 3]
    codes = unpack(q.packed, 301)
    assert (codes[1, 256:] == 0x7E0).all()
    assert q.packed[1, -1] >> 4 == 0  # the padding of the last word belongs to no column
    values = dequantize_e5m6(q)
    assert values[1, 256:].isnan().all()
    values[1, 256:] = 1
    assert (values == 1).all()


def test_the_layout_of_the_bytes() -> None:
    codes = torch.tensor([[0x123, 0xABC, 0xFFF]])
    assert pack(codes).tolist() == [[0x23, 0xC1, 0xAB, 0xFF, 0x0F, 0x00]]
    for cols in range(6):
        codes = torch.arange(5 * cols).view(5, cols) * 211 % 4096
        assert torch.equal(unpack(pack(codes), cols), codes.int())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(shape) -> None:
    q = quantize_e5m6(torch.empty(shape))
    assert q.shape == shape
    assert dequantize_e5m6(q, torch.bfloat16).shape == shape


def test_the_error_is_that_of_six_bits() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    q = quantize_e5m6(x)
    assert q.packed.numel() * 2 == x.numel() * 3
    assert 0.003 < relative_error(dequantize_e5m6(q), x) < 0.005
    # Seven significant bits are a BF16.
    assert torch.equal(dequantize_e5m6(q, torch.bfloat16).float(), dequantize_e5m6(q))


def test_bad_input_is_named() -> None:
    q = quantize_e5m6(torch.ones(2, 200))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        quantize_e5m6(torch.ones(3))
    with pytest.raises(TypeError, match=r"torch\.float16"):
        quantize_e5m6(torch.ones(2, 2, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"torch\.float64"):
        dequantize_e5m6(q, torch.float64)
    with pytest.raises(TypeError, match=r"torch\.int8"):
        E5M6(q.packed.view(torch.int8), q.scales, 200)
    with pytest.raises(ValueError, match=r"202 columns need \[rows, 303\]"):
        E5M6(q.packed, q.scales, 202)
    with pytest.raises(ValueError, match=r"needs \(2, 2\)"):
        E5M6(q.packed, q.scales[:, :1], 200)
    with pytest.raises(ValueError, match="contiguous"):
        E5M6(q.packed, q.scales.t().contiguous().t(), 200)
    with pytest.raises(ValueError, match="scales on meta"):
        E5M6(q.packed, q.scales.to("meta"), 200)
    with pytest.raises(ValueError, match="pack: codes have shape"):
        pack(torch.ones(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="pass integers"):
        pack(torch.ones(3, 3))
    with pytest.raises(ValueError, match="unpack: packed has shape"):
        unpack(q.packed, -1)
