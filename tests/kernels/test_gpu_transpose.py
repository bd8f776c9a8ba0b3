"""Quantisation along both sides on a GPU against the references on the CPU: codes and scales bit for bit."""

import itertools

import pytest
import torch

from kernels.formats.e5m6 import quantize_e5m6
from kernels.formats.grouped_quantize import (
    quantize_experts,
    quantize_experts_both,
    quantize_tokens,
    quantize_tokens_both,
    requantize_tokens,
)
from kernels.formats.quantize import Quantized, quantize_tiles
from kernels.formats.transpose import quantize_blocks_both, quantize_both, requantize_transpose


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "needs a GPU with E4M3 instructions (compute capability 8.9)"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs here")]
SHAPES = [(1, 1), (7, 129), (129, 48), (300, 1000), (1000, 576), (1024, 2048)]
SIZES = [[0, 1, 7, 129, 0, 128, 3, 0], [0, 0], [700, 40, 300], [size % 9 for size in range(256)]]


def _matrix(shape: tuple[int, ...], dtype: torch.dtype, spoiled: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x *= 10.0 ** torch.randint(-12, 12, (*shape[:-1], 1), generator=generator)
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    x[..., -1, -1] = 2.0**-130
    if spoiled:
        for place, bad in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf)):
            x.view(-1)[(place * 7919) % x.numel()] = bad
    return x.to(dtype)


def _same(found: Quantized, expected: Quantized) -> None:
    assert found.codes.shape == expected.codes.shape
    assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
    scales = found.scales.cpu()
    assert torch.equal(scales.isnan(), expected.scales.isnan())
    assert torch.equal(scales.nan_to_num(7.0), expected.scales.nan_to_num(7.0))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides(shape, dtype, power_of_two) -> None:
    for spoiled in (False, True):
        x = _matrix(shape, dtype, spoiled)
        for source, on_gpu in ((x, x.cuda()), (x.t(), x.cuda().t()), (x[:, 1:], x.cuda()[:, 1:])):
            for function in (quantize_both, quantize_blocks_both):
                pairs = zip(
                    function(on_gpu, power_of_two=power_of_two),
                    function(source, power_of_two=power_of_two),
                    strict=True,
                )
                for found, expected in pairs:
                    _same(found, expected)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_activations(shape, power_of_two) -> None:
    for spoiled, quantize in itertools.product((False, True), (quantize_tiles, quantize_e5m6)):
        x = _matrix(shape, torch.float32, spoiled)
        found = requantize_transpose(quantize(x.cuda()), power_of_two=power_of_two)
        _same(found, requantize_transpose(quantize(x), power_of_two=power_of_two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 130, 70), (5, 256, 384), (2, 200, 512)])
def test_experts(shape, dtype) -> None:
    w = _matrix(shape, dtype)
    for found, expected in zip(quantize_experts_both(w.cuda()), quantize_experts_both(w), strict=True):
        for expert in range(shape[0]):
            _same(found.expert(expert), expected.expert(expert))
    for expert in range(shape[0]):
        _same(quantize_experts(w.cuda()).expert(expert), quantize_experts(w).expert(expert))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [130, 384])
@pytest.mark.parametrize("rest", [0, 5, 300])
@pytest.mark.parametrize("sizes", SIZES)
def test_tokens_of_experts(sizes, rest, channels, dtype) -> None:
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    x = _matrix((sum(sizes) + rest + 1, channels), dtype)[: sum(sizes) + rest]
    x[sum(sizes) :] = torch.nan
    on_gpu, gpu_offsets = x.cuda(), offsets.cuda()
    for found, expected in zip(
        quantize_tokens_both(on_gpu, gpu_offsets), quantize_tokens_both(x, offsets), strict=True
    ):
        _same(found, expected)
    _same(quantize_tokens(on_gpu, gpu_offsets.int()), quantize_tokens(x, offsets))
    _same(
        requantize_tokens(quantize_tiles(on_gpu), gpu_offsets), requantize_tokens(quantize_tiles(x), offsets)
    )


def test_the_host_never_waits_for_offsets() -> None:
    x, offsets = torch.randn(200, 256, device="cuda"), torch.tensor([0, 30, 30, 190], device="cuda")
    q = quantize_tiles(x)
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            quantize_tokens(x, offsets)
            quantize_tokens_both(x, offsets)
            requantize_tokens(q, offsets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
