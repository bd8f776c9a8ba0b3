"""Quantisation against the float64 oracle, and at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.formats.quantize import BLOCKS, TILES, Quantized, dequantize, quantize_blocks, quantize_tiles
from kernels.metrics import relative_error
from tests.kernels.oracle import code_values, oracle

QUANTIZERS = {TILES: quantize_tiles, BLOCKS: quantize_blocks}
SIZES = st.sampled_from([1, 7, 127, 128, 129, 200, 300])


def code_bytes(q: Quantized) -> torch.Tensor:
    return q.codes.view(torch.uint8)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [TILES, BLOCKS])
@given(
    rows=SIZES,
    cols=SIZES,
    seed=st.integers(0, 2**32),
    exponent=st.integers(-130, 110),
    spread=st.sampled_from([0.0, 3.0, 12.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_is_bit_equal_to_the_oracle(block, power_of_two, rows, cols, seed, exponent, spread, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(rows, cols, generator=generator).mul(spread).exp2().clamp(max=2.0**10)
    x = (torch.randn(rows, cols, generator=generator) * size * 2.0**exponent).to(dtype)
    x[torch.rand(rows, cols, generator=generator) < 0.05] = 0
    found = QUANTIZERS[block](x, power_of_two=power_of_two)
    codes, scales = oracle(x.double().numpy(), block, power_of_two)
    np.testing.assert_array_equal(found.scales.double().numpy(), scales)
    np.testing.assert_array_equal(code_bytes(found).numpy(), codes)


def test_rounds_to_nearest_even_at_and_around_every_midpoint() -> None:
    magnitudes = torch.from_numpy(code_values()[:127]).float()
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    around = [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9))]
    values = torch.stack([torch.cat([magnitudes[-1:], part]) for part in around])  # 448 makes each scale 1
    found = quantize_tiles(torch.cat([values, -values]))
    assert found.scales.eq(1).all()
    code = torch.arange(126)
    expected = torch.stack([code + code % 2, code, code + 1])
    found_codes = code_bytes(found)[:, 1:]
    assert torch.equal(found_codes[:3], expected.to(torch.uint8))
    assert torch.equal(found_codes[3:], (expected + 128).to(torch.uint8))


def test_power_of_two_scales_step_exactly_at_448() -> None:
    top = torch.tensor(448.0) * 2.0 ** torch.arange(-100, 100)
    x = torch.stack([top.nextafter(torch.tensor(0.0)), top, top.nextafter(torch.tensor(torch.inf))]).view(
        -1, 1
    )
    scales = quantize_tiles(x, power_of_two=True).scales.view(3, -1)
    step = 2.0 ** torch.arange(-100, 100)
    assert torch.equal(scales, torch.stack([step, step, 2 * step]))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [TILES, BLOCKS])
def test_zero_tiles_have_scale_one_and_zeros_keep_their_sign(block, power_of_two) -> None:
    x = torch.zeros(130, 300)
    x[:, 1] = -0.0
    found = QUANTIZERS[block](x, power_of_two=power_of_two)
    assert found.scales.eq(1).all()
    assert torch.equal(dequantize(found).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [TILES, BLOCKS])
def test_small_gradients_keep_their_precision(block, power_of_two) -> None:
    """A floor of 1e-4 under amax would turn all of this to zero."""
    x = torch.randn(129, 257, generator=torch.Generator().manual_seed(0))
    normal = QUANTIZERS[block](x, power_of_two=power_of_two)
    tiny = QUANTIZERS[block](x * 2.0**-90, power_of_two=power_of_two)
    assert torch.equal(code_bytes(tiny), code_bytes(normal))
    assert torch.equal(tiny.scales, normal.scales * 2.0**-90)


def test_below_the_scale_floor_precision_fades_without_nan() -> None:
    x = torch.tensor([[2.0**-126, -(2.0**-130), 2.0**-149]])
    found = quantize_tiles(x)
    assert found.scales.item() == 2.0**-126
    assert dequantize(found).tolist() == [[2.0**-126, -(2.0**-130), 0.0]]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [TILES, BLOCKS])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spoil_their_own_block_only(bad, block, power_of_two) -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    clean = QUANTIZERS[block](x, power_of_two=power_of_two)
    x[150, 140] = bad
    found = QUANTIZERS[block](x, power_of_two=power_of_two)
    spoiled = torch.zeros(200, 300, dtype=torch.bool)
    spoiled[150 if block == TILES else slice(128, 200), 128:256] = True
    assert (code_bytes(found)[spoiled] == 0x7F).all()
    assert torch.equal(dequantize(found).isnan(), spoiled)
    assert torch.equal(code_bytes(found)[~spoiled], code_bytes(clean)[~spoiled])


@pytest.mark.parametrize("block", [TILES, BLOCKS])
def test_strided_input_equals_its_copy(block) -> None:
    x = torch.randn(300, 130, generator=torch.Generator().manual_seed(2))
    for view in (x.t(), x[::2, 1:], x[:1].expand(5, -1)):
        found, expected = QUANTIZERS[block](view), QUANTIZERS[block](view.contiguous())
        assert torch.equal(code_bytes(found), code_bytes(expected))
        assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("block", [TILES, BLOCKS])
@pytest.mark.parametrize("shape", [(0, 200), (5, 0), (0, 0)])
def test_empty_matrices(shape, block) -> None:
    found = QUANTIZERS[block](torch.empty(shape))
    assert found.shape == shape
    assert dequantize(found).shape == shape


def test_dequantize_knows_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    found = dequantize(Quantized(codes, torch.tensor([[1.0], [2.0]]), TILES))
    expected = code_values().reshape(2, 128) * np.array([[1.0], [2.0]])
    np.testing.assert_array_equal(found.double().numpy(), expected)


def test_dequantize_to_bf16_is_lossless_with_power_of_two_scales() -> None:
    found = quantize_tiles(
        torch.randn(33, 300, generator=torch.Generator().manual_seed(3)), power_of_two=True
    )
    assert torch.equal(dequantize(found, torch.bfloat16).float(), dequantize(found))


def test_an_outlier_costs_precision_in_its_own_tile_only() -> None:
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(4))
    x[0, 0] = 1e6
    found = dequantize(quantize_tiles(x))
    assert relative_error(found[0, 1:128], x[0, 1:128]) > 0.5
    assert relative_error(found[0, 128:], x[0, 128:]) < 0.03
    assert relative_error(found[1:], x[1:]) < 0.03


def test_blocks_transpose_without_change() -> None:
    found = quantize_blocks(torch.randn(130, 300, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(dequantize(found.transpose()), dequantize(found).t())
    with pytest.raises(ValueError, match="quantize the transposed values"):
        quantize_tiles(torch.ones(2, 2)).transpose()


def test_errors_name_the_fault() -> None:
    with pytest.raises(ValueError, match=r"quantize_tiles.*\(2, 3, 4\)"):
        quantize_tiles(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match=r"quantize_blocks.*float64"):
        quantize_blocks(torch.ones(2, 3, dtype=torch.float64))
    codes = torch.zeros(2, 200).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales have shape \(2, 1\).*need \(2, 2\)"):
        Quantized(codes, torch.ones(2, 1), TILES)
    with pytest.raises(TypeError, match="bfloat16"):
        Quantized(codes, torch.ones(2, 2, dtype=torch.bfloat16), TILES)
    with pytest.raises(ValueError, match="block is"):
        Quantized(codes, torch.ones(2, 2), (1, 64))
    with pytest.raises(ValueError, match="contiguous"):
        Quantized(codes.t(), torch.ones(200, 1), TILES)


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("cols", [3, 4])
def test_codes_are_decoded_wherever_they_lie(start, cols) -> None:
    """As the cast does it: every code, an odd or even number of them, from an odd or even address."""
    every = torch.arange(256, dtype=torch.uint8).repeat(2).view(torch.float8_e4m3fn)
    codes = every[start : start + 64 * cols].view(64, cols)
    found = dequantize(Quantized(codes, torch.ones(64, 1), TILES))
    torch.testing.assert_close(found, codes.float(), rtol=0, atol=0, equal_nan=True)
