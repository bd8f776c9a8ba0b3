"""The Triton kernels on a GPU against the references on the CPU: codes and scales bit for bit."""

import itertools

import pytest
import torch

from kernels.formats.e5m6 import dequantize_e5m6, quantize_e5m6
from kernels.formats.quantize import BLOCKS, TILES, Quantized, dequantize, quantize_blocks, quantize_tiles
from kernels.fused.cross_entropy import IGNORED, linear_cross_entropy
from kernels.fused.norm import rmsnorm_backward, rmsnorm_quantize
from kernels.fused.permute import permute, unpermute
from kernels.fused.swiglu import swiglu_backward, swiglu_quantize
from kernels.gemms.gemm import gemm
from kernels.layers.grouped_linear import fp8_grouped_linear
from kernels.layers.linear import fp8_linear
from kernels.metrics import MAX_ERROR_BF16, MAX_ERROR_FP32, relative_error


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "needs a GPU with E4M3 instructions (compute capability 8.9)"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs here")]
QUANTIZERS = {TILES: quantize_tiles, BLOCKS: quantize_blocks}


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [TILES, BLOCKS])
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (129, 127), (300, 1000), (1024, 2048)])
def test_codes_and_scales_are_those_of_the_reference(shape, block, dtype, power_of_two) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-12, 12, (shape[0], 1), generator=generator)
    x = (torch.randn(shape, generator=generator) * sizes).to(dtype)
    x[torch.rand(shape, generator=generator) < 0.05] = 0
    x[0, :128] = 0
    x[-1, -1] = 2.0**-130
    for source in (x, x.t()):
        found = QUANTIZERS[block](source.cuda(), power_of_two=power_of_two)
        expected = QUANTIZERS[block](source, power_of_two=power_of_two)
        assert torch.equal(found.scales.cpu(), expected.scales)
        assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))


@pytest.mark.parametrize("block", [TILES, BLOCKS])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_surface(bad, block) -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    x[150, 140] = bad
    found, expected = QUANTIZERS[block](x.cuda()), QUANTIZERS[block](x)
    assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.scales.isnan().cpu(), expected.scales.isnan())


def test_every_midpoint_rounds_to_even() -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    x = torch.stack([torch.cat([values[-1:], middle]), -torch.cat([values[-1:], middle])])
    found, expected = quantize_tiles(x.cuda()), quantize_tiles(x)
    assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))


@pytest.mark.parametrize("block", [TILES, BLOCKS])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 256, 128), (7, 129, 200), (129, 7, 385), (1500, 520, 1024), (256, 512, 7168)],
)
def test_gemm_error_against_float64(m, n, k, block) -> None:
    generator = torch.Generator().manual_seed(2)
    a = quantize_tiles(torch.randn(m, k, generator=generator).cuda())
    b = QUANTIZERS[block](torch.randn(n, k, generator=generator).cuda())
    exact = dequantize(a).double() @ dequantize(b).double().t()
    assert relative_error(gemm(a, b), exact) < MAX_ERROR_FP32
    assert relative_error(gemm(a, b, torch.bfloat16), exact) < MAX_ERROR_BF16


@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_linear_is_that_of_the_cpu(tokens) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 384, generator=generator)
    weight, dy = torch.randn(200, 384, generator=generator), torch.randn(tokens, 200, generator=generator)
    results = []
    for device in ("cuda", "cpu"):
        leaves = (x.to(device).requires_grad_(), weight.to(device).requires_grad_())
        y = fp8_linear(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(device))))
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert relative_error(found.cpu(), expected) < MAX_ERROR_FP32


@pytest.mark.parametrize("sizes", [[0, 1, 7, 129, 0, 128, 3, 0], [0, 0], [700, 40, 300]])
@pytest.mark.parametrize("n_out", [200, 256])
def test_grouped_linear_is_that_of_the_cpu(n_out, sizes) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens, offsets = sum(sizes) + 5, torch.tensor([0, *itertools.accumulate(sizes)])
    x = torch.randn(tokens, 384, generator=generator)
    weight = torch.randn(len(sizes), n_out, 384, generator=generator)
    dy = torch.randn(tokens, n_out, generator=generator)
    results = []
    for device in ("cuda", "cpu"):
        leaves = (x.to(device).requires_grad_(), weight.to(device).requires_grad_())
        y = fp8_grouped_linear(*leaves, offsets.to(device))
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(device))))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found.cpu(), expected) < MAX_ERROR_FP32


def test_grouped_linear_never_waits_for_the_gpu() -> None:
    x = torch.randn(200, 256, device="cuda", requires_grad=True)
    weight = torch.randn(3, 200, 256, device="cuda", requires_grad=True)
    offsets, dy = torch.tensor([0, 30, 30, 190], device="cuda"), torch.randn(200, 200, device="cuda")
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            fp8_grouped_linear(x, weight, offsets).backward(dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_tensors_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(64, 256, device="cuda:1")
    assert relative_error(dequantize(quantize_tiles(x)), x) < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (300, 1000), (1024, 2048)])
def test_e5m6_is_that_of_the_reference(shape, dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-9, 1, shape, generator=generator)
    x[0, :128], x[-1, -1] = 0, float("nan")
    for source in (x.to(dtype), x.to(dtype).t(), x.to(dtype) * 2.0**-120):
        found, expected = quantize_e5m6(source.cuda()), quantize_e5m6(source)
        assert torch.equal(found.packed.cpu(), expected.packed)
        assert torch.equal(found.scales.cpu().nan_to_num(), expected.scales.nan_to_num())
        found_values, values = dequantize_e5m6(found, dtype).cpu(), dequantize_e5m6(expected, dtype)
        assert torch.equal(found_values.isnan(), values.isnan())
        assert torch.equal(found_values.nan_to_num(), values.nan_to_num())


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 64), (1, 1), (37, 1500), (500, 7168)])
def test_permute_is_that_of_the_cpu(tokens, hidden, dtype, slots) -> None:
    generator = torch.Generator().manual_seed(5)
    experts = torch.randint(60, (tokens, slots), generator=generator)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, slots, generator=generator)
    results = []
    for device in ("cuda", "cpu"):
        leaves = (x.to(device).requires_grad_(), weights.to(device).requires_grad_())
        rows, plan = permute(leaves[0], experts.to(device), 64)
        out = unpermute(rows, plan, leaves[1])
        results.append((plan.offsets, rows, out, *torch.autograd.grad(out, leaves, x.to(device))))
    for found, expected in zip(results[0][:-1], results[1][:-1], strict=True):
        assert torch.equal(found.cpu(), expected)
    assert relative_error(results[0][-1].cpu(), results[1][-1]) < 1e-5


def test_rows_of_experts_that_do_not_exist_come_last() -> None:
    experts = torch.tensor([[0, -1], [5, 2], [1, 0]])
    _, plan = permute(torch.randn(3, 16).cuda(), experts.cuda(), 3)
    assert plan.offsets.tolist() == [0, 2, 3, 4]
    assert plan.pair.tolist()[:4] == [0, 5, 4, 3]


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 64), (1, 1), (37, 1500), (500, 7168)])
def test_permute_moves_fp8_rows_with_their_scales(tokens, hidden) -> None:
    generator = torch.Generator().manual_seed(5)
    experts = torch.randint(60, (tokens, 8), generator=generator)
    q = quantize_tiles(torch.randn(tokens, hidden, generator=generator))
    found, _ = permute(Quantized(q.codes.cuda(), q.scales.cuda(), TILES), experts.cuda(), 64)
    expected, _ = permute(q, experts, 64)
    assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.scales.cpu(), expected.scales)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(
    ("positions", "vocabulary"), [(0, 10), (1, 1), (600, 4097), (2500, 70), (530, 129280)]
)
def test_cross_entropy_is_that_of_the_cpu(positions, vocabulary, dtype, limit) -> None:
    generator = torch.Generator().manual_seed(6)
    states = torch.randn(positions, 64, generator=generator).to(dtype)
    head = torch.randn(vocabulary, 64, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    targets[2::5] = IGNORED
    results = []
    for device in ("cuda", "cpu"):
        leaves = (states.to(device).requires_grad_(), head.to(device).requires_grad_())
        loss = linear_cross_entropy(*leaves, targets.to(device), 1e-4, reduction="mean")
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for found, expected in zip(*results, strict=True):
        assert (found.cpu() - expected).norm() <= limit * expected.norm() + 1e-6


def test_a_target_outside_the_vocabulary_surfaces() -> None:
    states, head = torch.randn(3, 8, device="cuda"), torch.randn(9, 8, device="cuda")
    for target in (-1, 9):
        assert linear_cross_entropy(states, head, torch.tensor([0, target, 1], device="cuda")).isnan()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_permute_and_cross_entropy_never_wait_for_the_device() -> None:
    x, weights = torch.randn(9, 64, device="cuda"), torch.rand(9, 2, device="cuda")
    experts = torch.randint(5, (9, 2), device="cuda")
    head, targets = torch.randn(30, 64, device="cuda"), torch.randint(30, (9,), device="cuda")
    leaves = [leaf.requires_grad_() for leaf in (x, weights, head)]

    def step() -> None:
        rows, plan = permute(x, experts, 5)
        linear_cross_entropy(unpermute(rows, plan, weights), head, targets).backward(inputs=leaves)

    step()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, NaN in the same places."""
    found = found.cpu()
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    )


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 128, 200, 2048, 5001])
def test_swiglu_is_that_of_the_cpu(width, dtype, cached, power_of_two) -> None:
    generator = torch.Generator().manual_seed(4)
    both = (torch.randn(37, 2 * width, generator=generator) * 20).to(dtype)
    both[5, 0], both[6, -1], both[7, 0] = torch.nan, torch.inf, -torch.inf
    weights, dy = torch.rand(37, generator=generator), torch.randn(37, width, generator=generator).to(dtype)
    source = quantize_tiles(both) if cached else both
    on_gpu = Quantized(source.codes.cuda(), source.scales.cuda(), TILES) if cached else both.cuda()
    for weight in (None, weights):
        gpu_weight = None if weight is None else weight.cuda()
        found = swiglu_quantize(on_gpu, gpu_weight, power_of_two=power_of_two)
        expected = swiglu_quantize(source, weight, power_of_two=power_of_two)
        assert _equal(found.scales, expected.scales)
        assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
        d_both, d_weights = swiglu_backward(dy.cuda(), on_gpu, gpu_weight)
        expected_both, expected_weights = swiglu_backward(dy, source, weight)
        assert _equal(d_both, expected_both)
        assert weight is None or _equal(d_weights, expected_weights)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [1, 128, 576, 1100, 7168])
def test_rmsnorm_is_that_of_the_cpu(cols, dtype, power_of_two) -> None:
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(600, cols, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(cols, generator=generator).to(dtype)
    for spoiled in (False, True):
        if spoiled:
            x[5, 0], x[6, -1] = torch.nan, torch.inf
        found, inverse = rmsnorm_quantize(x.cuda(), weight.cuda(), 1e-6, power_of_two=power_of_two)
        expected, expected_inverse = rmsnorm_quantize(x, weight, 1e-6, power_of_two=power_of_two)
        assert _equal(inverse, expected_inverse)
        assert _equal(found.scales, expected.scales)
        assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
        dx, dweight = rmsnorm_backward(dy.cuda(), x.cuda(), weight.cuda(), inverse)
        expected_dx, expected_dweight = rmsnorm_backward(dy, x, weight, expected_inverse)
        assert _equal(dx, expected_dx)
        if spoiled:
            assert dweight.isnan().all()
        else:
            assert relative_error(dweight.cpu(), expected_dweight) < MAX_ERROR_BF16
