"""Run by test_swiglu.py and test_norm.py in a process of its own, under TRITON_INTERPRET=1.

Results are compared bit for bit with the references. The interpreter's casts to E4M3 and BF16, and its fused
multiplication and addition, round otherwise than the hardware and are replaced.
"""

import itertools
import sys

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels.formats.quantize import TILES, Quantized, quantize_reference
from kernels.fused import norm, swiglu
from kernels.metrics import relative_error
from tests.kernels.exact_casts import exact_casts
from tests.kernels.guard import guarded

WIDTHS = (1, 128, 200, 2100)
BAD = (torch.nan, -torch.nan, torch.inf, -torch.inf)


def fma(builder: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """One rounding, as the hardware does it, wherever FP64 holds the sum (see `kernels.formats.exact`)."""
    total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(total.astype(np.float32), z.dtype.scalar)


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Equal bit for bit, a NaN of any bits being equal to another."""
    if found is None or expected is None:
        return found is expected
    if found.dtype != expected.dtype or not torch.equal(found.isnan(), expected.isnan()):
        return False
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    return torch.equal(found.nan_to_num(7.0).view(bits), expected.nan_to_num(7.0).view(bits))


def same_codes(found: Quantized, expected: Quantized) -> bool:
    """Equal bit for bit."""
    codes = [one.codes.view(torch.uint8) for one in (found, expected)]
    return same(found.scales, expected.scales) and torch.equal(*codes)


def rows_of(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator)
    return x * 10.0 ** torch.randint(-3, 3, (shape[0], 1), generator=generator)


def check_swiglu(generator: torch.Generator) -> None:
    kinds = ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True))
    for width, (dtype, weighted) in itertools.product(WIDTHS, kinds):
        values = rows_of((5, 2 * width), generator).to(dtype)
        weights = torch.rand(5, generator=generator).to(dtype) if weighted else None
        dy = torch.randn(5, width, generator=generator)
        spoiled = values.clone()
        for row, bad in enumerate(BAD):
            spoiled[row, (row * 37) % (2 * width)] = bad
        transposed = values.t().contiguous().t()
        for both in (values, transposed, spoiled, quantize_reference(values, TILES)):
            for power_of_two in (False, True) if both is values else (False,):
                found = swiglu.swiglu_quantize_triton(both, weights, power_of_two=power_of_two)
                expected = swiglu.swiglu_quantize_reference(both, weights, power_of_two=power_of_two)
                assert same_codes(found, expected), ("quantize", width, dtype, weighted, power_of_two)
            for grad in (dy, dy.t().contiguous().t()) if both is values else (dy,):
                found = swiglu.swiglu_backward_triton(grad, both, weights)
                expected = swiglu.swiglu_backward_reference(grad, both, weights)
                assert same(found[0], expected[0]), ("d_both", width, dtype, weighted)
                if dtype == torch.bfloat16 and weighted:
                    assert torch.equal(found[1].isnan(), expected[1].isnan())
                    assert relative_error(found[1].nan_to_num(), expected[1].nan_to_num()) < 2.0**-7
                else:
                    assert same(found[1], expected[1]), ("d_weights", width, dtype)
    # Gates across the whole range of the logistic function.
    small = torch.logspace(-9, 0, 5_000)
    edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, -86.6, -86.7, 1e30, -1e30])
    gates = torch.cat([torch.linspace(-120, 120, 60_000), small, -small, edges])
    both = torch.cat([gates, torch.ones_like(gates)])[None]
    found = swiglu.swiglu_backward_triton(torch.ones(1, gates.numel()), both)[0]
    assert same(found, swiglu.swiglu_backward_reference(torch.ones(1, gates.numel()), both)[0])


def check_norm(generator: torch.Generator) -> None:
    for width, dtype in itertools.product(WIDTHS, (torch.float32, torch.bfloat16)):
        x = rows_of((7, width), generator).to(dtype)
        x[3] = 0
        spoiled = x.clone()
        for row, bad in enumerate(BAD):
            spoiled[row, (row * 37) % width] = bad
        spoiled[5, 0] = 1e25
        weight = torch.randn(width, generator=generator).to(dtype)
        dy = torch.randn(7, width, generator=generator)
        for source in (x, x.t().contiguous().t(), spoiled) if width == 200 else (x, spoiled):
            for power_of_two in (False, True) if source is x else (False,):
                found = norm.rmsnorm_quantize_triton(source, weight, 1e-6, power_of_two=power_of_two)
                expected = norm.rmsnorm_quantize_reference(source, weight, 1e-6, power_of_two=power_of_two)
                assert same(found[1], expected[1]), ("inverse", width, dtype)
                assert same_codes(found[0], expected[0]), ("quantize", width, dtype, power_of_two)
            found = norm.rmsnorm_backward_triton(dy, source, weight, expected[1])
            gradients = norm.rmsnorm_backward_reference(dy, source, weight, expected[1])
            assert same(found[0], gradients[0]), ("dx", width, dtype)
            assert torch.equal(found[1].isnan(), gradients[1].isnan())
            assert relative_error(found[1].nan_to_num(), gradients[1].nan_to_num()) < 4e-3
    # More rows than one slab of the weight's gradient.
    x, dy = (torch.randn(norm.SLAB + 44, 130, generator=generator) for _ in range(2))
    inverse = torch.rand(x.shape[0], generator=generator)
    weight = torch.ones(130)
    found = norm.rmsnorm_backward_triton(dy, x, weight, inverse)[1]
    assert relative_error(found, norm.rmsnorm_backward_reference(dy, x, weight, inverse)[1]) < 1e-6


if __name__ == "__main__":
    InterpreterBuilder.create_fma = fma
    with guarded(), exact_casts():
        {"swiglu": check_swiglu, "norm": check_norm}[sys.argv[1]](torch.Generator().manual_seed(0))
    print("interpreted kernels agree")
