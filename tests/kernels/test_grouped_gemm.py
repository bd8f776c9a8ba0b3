"""The grouped FP8 GEMMs: references against float64 and against one `gemm` for each expert."""

import itertools

import numpy as np
import pytest
import torch

from kernels.formats.grouped_quantize import QuantizedExperts, quantize_experts, quantize_tokens, token_groups
from kernels.formats.quantize import TILES, Quantized, dequantize, quantize_blocks, quantize_tiles
from kernels.gemms.gemm import gemm
from kernels.gemms.gemm_tiles import SMALL
from kernels.gemms.grouped_gemm import CONFIGS, config_for, grouped_gemm, grouped_gemm_k
from kernels.metrics import MAX_ERROR_BF16, relative_error
from tests.kernels.interpreter import needs_interpreter, run_interpreted

# Tokens of each expert.
SIZES = ([5], [0, 1, 7, 129, 0, 128, 3, 0], [0, 0, 0], [64, 300], [127, 257, 1])
SHAPES = ((1, 1), (129, 200), (256, 128), (300, 385))  # N, K


def offsets_of(sizes: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=dtype)


def spans(offsets: torch.Tensor) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(offsets.tolist())]


def tokens_and_weights(tokens: int, experts: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values whose size differs between tiles, tokens and experts: a scale in the wrong place cannot hide."""
    generator = torch.Generator().manual_seed(tokens + n)
    x = torch.randn(tokens, k, generator=generator)
    x *= 4.0 ** (torch.arange(k) // 128 + torch.arange(tokens)[:, None] % 5)
    w = torch.randn(experts, n, k, generator=generator)
    w *= 3.0 ** (torch.arange(n)[:, None] // 128 - torch.arange(k) // 128)
    return x, w * 2.0 ** torch.arange(experts)[:, None, None]


def values64(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A matrix in float64, each scale spread over its block by numpy."""
    spread = scales.double().numpy()
    for axis in (0, 1):
        spread = np.repeat(spread, block[axis], axis=axis)
    return codes.double() * torch.from_numpy(spread[: codes.shape[0], : codes.shape[1]])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_error_against_float64(n, k, sizes) -> None:
    x, w = tokens_and_weights(sum(sizes), len(sizes), n, k)
    a, b, offsets = quantize_tiles(x), quantize_experts(w), offsets_of(sizes)
    a64 = values64(a.codes, a.scales, a.block)
    exact = torch.cat(
        [
            a64[rows] @ values64(b.codes[e], b.scales[e], (128, 128)).t()
            for e, rows in enumerate(spans(offsets))
        ]
    )
    found = grouped_gemm(a, b, offsets)
    assert (found.shape, found.dtype) == ((sum(sizes), n), torch.float32)
    assert relative_error(found, exact) < 1e-6  # no tensor core on a CPU: only FP32 rounding
    rounded = grouped_gemm(a, b, offsets, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, exact) < MAX_ERROR_BF16


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_gemm_for_each_expert(dtype, offset_dtype) -> None:
    sizes = [0, 1, 7, 129, 0, 128, 3, 0]
    x, w = tokens_and_weights(sum(sizes), len(sizes), 129, 200)
    offsets = offsets_of(sizes, offset_dtype)
    found = grouped_gemm(quantize_tiles(x), quantize_experts(w), offsets, dtype)
    for e, rows in enumerate(spans(offsets)):
        assert torch.equal(found[rows], gemm(quantize_tiles(x[rows]), quantize_blocks(w[e]), dtype))


def test_rows_of_no_expert_are_zero() -> None:
    x, w = tokens_and_weights(200, 3, 40, 130)
    x[150:] = torch.nan
    found = grouped_gemm(quantize_tiles(x), quantize_experts(w), torch.tensor([0, 20, 20, 150]))
    assert torch.equal(found[150:], torch.zeros(50, 40))
    assert found[:150].isfinite().all()


@pytest.mark.parametrize(("tokens", "n", "k"), [(0, 5, 128), (5, 0, 128), (3, 4, 0)])
def test_empty_sizes_give_zeros(tokens, n, k) -> None:
    a, b = quantize_tiles(torch.empty(tokens, k)), quantize_experts(torch.empty(2, n, k))
    offsets = torch.tensor([0, tokens // 2, tokens])
    assert torch.equal(grouped_gemm(a, b, offsets), torch.zeros(tokens, n))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_token_tiles_start_with_each_expert(sizes, power_of_two) -> None:
    x = tokens_and_weights(sum(sizes), 1, 1, 130)[0]
    offsets = offsets_of(sizes)
    found = quantize_tokens(x, offsets, power_of_two=power_of_two)
    assert found.shape == (130, 128 * token_groups(sum(sizes), len(sizes)))
    start = 0
    for rows in spans(offsets):
        expected = quantize_tiles(x[rows].t(), power_of_two=power_of_two)
        tokens, groups = expected.codes.shape[1], expected.scales.shape[1]
        inside = slice(start * 128, start * 128 + tokens)
        assert torch.equal(found.codes[:, inside].view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(found.scales[:, start : start + groups], expected.scales)
        filling = found.codes[:, inside.stop : (start + groups) * 128].view(torch.uint8)
        assert not filling.any()
        start += groups
    assert not found.codes[:, start * 128 :].view(torch.uint8).any()
    assert (found.scales[:, start:] == 1).all()


def test_most_groups_are_reached_and_never_exceeded() -> None:
    assert token_groups(3, 3) == 3  # one token each
    assert token_groups(2, 3) == 2
    assert token_groups(128 * 5, 1) == 5
    assert token_groups(0, 4) == 3  # a bound: no tokens fill none of them
    for sizes in itertools.product((0, 1, 127, 128, 129), repeat=3):
        assert sum(-(-size // 128) for size in sizes) <= token_groups(sum(sizes), 3)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weight_gradients_are_added(n, k, sizes) -> None:
    dy, x = tokens_and_weights(sum(sizes), 1, 1, n)[0], tokens_and_weights(sum(sizes), 1, 2, k)[0]
    offsets = offsets_of(sizes)
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(len(sizes), n, k, generator=generator)
    out = before.clone()
    grouped_gemm_k(quantize_tokens(dy, offsets), quantize_tokens(x, offsets), offsets, out)
    for e, rows in enumerate(spans(offsets)):
        a, b = quantize_tiles(dy[rows].t()), quantize_tiles(x[rows].t())
        exact = before[e].double()
        if rows.start < rows.stop:
            exact = exact + values64(a.codes, a.scales, TILES) @ values64(b.codes, b.scales, TILES).t()
            assert relative_error(out[e], before[e] + gemm(a, b)) < 1e-6
        else:
            assert torch.equal(out[e], before[e])
        assert relative_error(out[e], exact) < 1e-6


def test_weight_gradients_equal_one_gemm_for_each_expert() -> None:
    sizes = [0, 256, 0, 128, 7, 0]
    dy, x = tokens_and_weights(sum(sizes), 1, 1, 130)[0], tokens_and_weights(sum(sizes), 1, 2, 70)[0]
    offsets = offsets_of(sizes)
    a, b = quantize_tokens(dy, offsets), quantize_tokens(x, offsets)
    out = torch.zeros(len(sizes), 130, 70)
    grouped_gemm_k(a, b, offsets, out)
    start = 0
    for e, size in enumerate(sizes):
        groups = slice(start, start + -(-size // 128))
        columns = slice(groups.start * 128, groups.stop * 128)
        parts = [
            Quantized(q.codes[:, columns].contiguous(), q.scales[:, groups].contiguous(), TILES)
            for q in (a, b)
        ]
        assert torch.equal(out[e], gemm(*parts))
        start = groups.stop


def test_poison_stays_with_its_expert() -> None:
    sizes = [3, 130, 0, 40]
    dy, x = tokens_and_weights(sum(sizes), 1, 1, 20)[0], tokens_and_weights(sum(sizes), 1, 2, 30)[0]
    offsets = offsets_of(sizes)
    dy[2, 0] = x[5, 1] = torch.nan  # the last token of expert 0, an early one of expert 1
    out = torch.zeros(4, 20, 30)
    out[2] = torch.nan  # an expert without tokens: not even read
    grouped_gemm_k(quantize_tokens(dy, offsets), quantize_tokens(x, offsets), offsets, out)
    assert out[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()
    assert out[1, :, 1].isnan().all()
    assert out[1, :, 2:].isfinite().all()
    assert out[2].isnan().all()
    assert out[3].isfinite().all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 128, 200), (2, 129, 257), (3, 0, 5), (2, 128, 0), (2, 256, 130)]
)
def test_weights_are_quantised_expert_by_expert(shape) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for source in (w, w.mT.contiguous().mT, w.bfloat16()):
        q = quantize_experts(source, power_of_two=True)
        for e in range(shape[0]):
            expected = quantize_blocks(source[e], power_of_two=True)
            assert torch.equal(q.codes[e].view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(q.scales[e], expected.scales)
            turned = q.transpose().expert(e)
            assert torch.equal(dequantize(turned), dequantize(expected).t())


def test_launch_shape_follows_the_mean_expert() -> None:
    sizes = (4096, torch.bfloat16, torch.device("cpu"))
    assert config_for(64 * 8, 8, *sizes) == SMALL
    assert config_for(64 * 8 + 1, 8, *sizes) == CONFIGS[0]


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted_gemm.py", "grouped")


def test_errors_name_the_fault() -> None:
    x, w = torch.ones(10, 128), torch.ones(2, 64, 128)
    a, b, offsets = quantize_tiles(x), quantize_experts(w), torch.tensor([0, 4, 10])
    for call, error, message in (
        (
            (quantize_blocks(x), b, offsets),
            ValueError,
            r"grouped_gemm: a is quantised in blocks of \(128, 128\)",
        ),
        ((quantize_tiles(x[:, :64]), b, offsets), ValueError, r"a is \(10, 64\) and b \(2, 64, 128\)"),
        ((a, b, offsets, torch.float16), TypeError, "out_dtype is torch.float16"),
        ((a, b, offsets.float()), TypeError, "offsets are torch.float32"),
        ((a, b, offsets[None]), ValueError, r"offsets have shape \(1, 3\)"),
        ((a, b, offsets[:2]), ValueError, "2 offsets and 2 experts"),
        ((a, b, torch.tensor([0, 4, 11])), ValueError, r"offsets are \[0, 4, 11\].*at most the 10 tokens"),
        ((a, b, torch.tensor([1, 4, 10])), ValueError, "rise from 0"),
        ((a, b, torch.tensor([0, 11, 10])), ValueError, "rise from 0"),
    ):
        with pytest.raises(error, match=message):
            grouped_gemm(*call)


def test_errors_of_weight_gradients_name_the_fault() -> None:
    x, offsets, out = torch.ones(10, 8), torch.tensor([0, 4, 10]), torch.zeros(2, 8, 8)
    a = quantize_tokens(x, offsets)
    for call, error, message in (
        ((quantize_tiles(x.t()), a, offsets, out), ValueError, "make both with quantize_tokens"),
        ((a, a, offsets, out.double()), TypeError, "out is torch.float64"),
        ((a, a, offsets, out[:1]), ValueError, r"need a contiguous \(2, 8, 8\)"),
        ((a, a, offsets, out.mT), ValueError, r"need a contiguous \(2, 8, 8\)"),
        ((a, a, torch.tensor([0, 129, 200]), out), ValueError, "need 3 groups of 128 columns"),
    ):
        with pytest.raises(error, match=message):
            grouped_gemm_k(*call)


def test_errors_of_quantisers_name_the_fault() -> None:
    q = quantize_experts(torch.ones(2, 130, 128))
    for parts, error, message in (
        ((q.codes.view(torch.uint8), q.scales), TypeError, "codes are torch.uint8"),
        ((q.codes[0], q.scales[0]), ValueError, r"codes have shape \(130, 128\)"),
        ((q.codes, q.scales[:, :1]), ValueError, r"need \(2, 2, 1\)"),
        ((q.codes, q.scales.to("meta")), ValueError, "scales on meta"),
        ((q.codes.mT, q.scales.mT), ValueError, "must be contiguous"),
    ):
        with pytest.raises(error, match=f"QuantizedExperts: .*{message}"):
            QuantizedExperts(*parts)
    with pytest.raises(ValueError, match=r"quantize_experts: the tensor has shape \(0, 3, 4\)"):
        quantize_experts(torch.ones(0, 3, 4))
    with pytest.raises(TypeError, match="float16"):
        quantize_experts(torch.ones(2, 3, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"quantize_tokens: x has shape \(2, 3, 4\)"):
        quantize_tokens(torch.ones(2, 3, 4), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="quantize_tokens: offsets are on meta"):
        quantize_tokens(torch.ones(3, 4), torch.zeros(2, dtype=torch.int64, device="meta"))
