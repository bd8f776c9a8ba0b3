"""Run by test_interpreted.py in a process of its own, under TRITON_INTERPRET=1.

Triton's CPU interpreter rounds wrongly when it casts to E4M3, so codes are compared only where the quotient
is itself an E4M3 value and the cast has nothing to round. Scales, masks and addresses need no such care.
"""

import itertools

import numpy as np
import torch

from kernels.formats.e5m6 import (
    dequantize_e5m6_reference,
    dequantize_e5m6_triton,
    quantize_e5m6_reference,
    quantize_e5m6_triton,
)
from kernels.formats.quantize import (
    BLOCKS,
    TILES,
    quantize_blocks_triton,
    quantize_reference,
    quantize_tiles_triton,
)
from kernels.fused.cross_entropy import IGNORED, softmax_reference, softmax_triton
from kernels.fused.permute import (
    combine_reference,
    combine_triton,
    gather_reference,
    gather_triton,
    plan_rows,
    weight_gradient_reference,
    weight_gradient_triton,
)
from kernels.metrics import relative_error
from tests.kernels.guard import guarded

SHAPES = ((1, 1), (7, 129), (33, 128), (129, 257))
KERNELS = {TILES: quantize_tiles_triton, BLOCKS: quantize_blocks_triton}


def exact_matrix(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """E4M3 values times one power of two, with 448 in every row and block: scales come out as that power."""
    codes = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
    codes |= torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7
    codes[:, ::128] = 126
    return codes.view(torch.float8_e4m3fn).float() * 2.0**-31


def check_scales(generator: torch.Generator) -> None:
    for shape, dtype, block, power_of_two in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16), KERNELS, (False, True)
    ):
        x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(
            -12, 12, shape, generator=generator
        )
        for source in (x.to(dtype), x.to(dtype).t().contiguous().t(), torch.zeros(shape, dtype=dtype)):
            found = KERNELS[block](source, power_of_two=power_of_two)
            expected = quantize_reference(source, block, power_of_two=power_of_two)
            assert torch.equal(found.scales, expected.scales), (shape, dtype, block, power_of_two)


def check_spoiled_scales() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(40, 300)
        x[35, 140] = bad
        for block, kernel in KERNELS.items():
            found = kernel(x).scales
            expected = quantize_reference(x, block).scales
            assert torch.equal(found.isnan(), expected.isnan()), (bad, block)
            assert torch.equal(found.nan_to_num(), expected.nan_to_num()), (bad, block)


def check_floor() -> None:
    x = torch.tensor([[2.0**-126], [2.0**-149], [448 * 2.0**-126]])
    for power_of_two in (False, True):
        assert (quantize_tiles_triton(x, power_of_two=power_of_two).scales == 2.0**-126).all()


def check_codes(generator: torch.Generator) -> None:
    for shape, block, power_of_two in itertools.product(SHAPES, KERNELS, (False, True)):
        x = exact_matrix(shape, generator)
        for source in (x, x.t().contiguous().t()):
            found = KERNELS[block](source, power_of_two=power_of_two)
            expected = quantize_reference(source, block, power_of_two=power_of_two)
            assert torch.equal(found.scales, expected.scales), (shape, block)
            assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8)), (
                shape,
                block,
            )


def check_e5m6(generator: torch.Generator) -> None:
    # Rows of a multiple of 8 columns are moved in words, others in bytes.
    for shape, dtype in itertools.product((*SHAPES, (5, 200)), (torch.float32, torch.bfloat16)):
        sizes = 10.0 ** torch.randint(-9, 1, shape, generator=generator)
        x = torch.randn(shape, generator=generator) * sizes
        x[x.abs() < 1e-8] = -0.0
        # The interpreter misreads subnormal BF16 numbers.
        spoiled, tiny = x.clone(), x * (2.0**-130 if dtype == torch.float32 else 2.0**-60)
        spoiled[-1, -1] = torch.nan
        huge = torch.full(shape, 1.5 * 2.0**127)
        for source in (x, x.t().contiguous().t(), spoiled, tiny, huge, torch.zeros(shape)):
            source = source.to(dtype)
            found, expected = quantize_e5m6_triton(source), quantize_e5m6_reference(source)
            assert torch.equal(found.packed, expected.packed), (shape, dtype)
            assert torch.equal(found.scales.view(torch.int32), expected.scales.view(torch.int32))
            found_values = dequantize_e5m6_triton(found, dtype)
            expected_values = dequantize_e5m6_reference(found, dtype)
            assert torch.equal(found_values.isnan(), expected_values.isnan()), (shape, dtype)
            found_values, expected_values = found_values.nan_to_num(7.0), expected_values.nan_to_num(7.0)
            assert torch.equal(
                found_values.float().view(torch.int32), expected_values.float().view(torch.int32)
            )


def check_permute(generator: torch.Generator) -> None:
    for (tokens, hidden), slots, dtype in itertools.product(
        ((0, 3), (3, 0), (1, 1), (9, 1500)), (1, 8), (torch.float32, torch.bfloat16)
    ):
        plan = plan_rows(torch.randint(5, (tokens, slots), generator=generator), 6)
        x = torch.randn(hidden, tokens, generator=generator).t()
        y = torch.randn(tokens * slots, hidden, generator=generator)
        factors = torch.randn(slots, tokens, generator=generator).t()
        if dtype == torch.bfloat16:
            # The interpreter truncates to BF16, so results must be numbers that need no rounding.
            x, y, factors = (values.round().to(dtype) for values in (x, y, factors))
        for weights in (None, factors):
            assert torch.equal(gather_triton(x, plan, weights), gather_reference(x, plan, weights))
            assert torch.equal(combine_triton(y, plan, weights), combine_reference(y, plan, weights))
        codes = torch.randint(256, (tokens, 2 * hidden + 1), generator=generator, dtype=torch.uint8)
        assert torch.equal(gather_triton(codes, plan), gather_reference(codes, plan))
        found, expected = weight_gradient_triton(y, x, plan), weight_gradient_reference(y, x, plan)
        assert relative_error(found, expected) < 1e-6, (tokens, hidden, slots, dtype)


def check_e5m6_codes() -> None:
    """Every finite code, every midpoint and the numbers beside it."""
    values = (torch.arange(0x7C0) << 4).to(torch.int16).view(torch.float16).float()
    middle = (values[1:] + values[:-1]) / 2
    sides = [torch.nextafter(middle, torch.tensor(side)) for side in (0.0, 1e9)]
    every = torch.cat([values, middle, *sides])
    x = torch.full((2 * len(every), 2), 65024.0)  # makes the scale 1
    x[:, 1] = torch.cat([every, -every])
    found = quantize_e5m6_triton(x)
    assert torch.equal(found.packed, quantize_e5m6_reference(x).packed)
    assert torch.equal(dequantize_e5m6_triton(found), dequantize_e5m6_reference(found))


def check_cross_entropy(generator: torch.Generator) -> None:
    # 40,000 columns are three steps of a program. The interpreter truncates to BF16: up to 2**-7 off.
    for (rows, vocabulary), (dtype, limit), z_loss in itertools.product(
        ((0, 3), (1, 1), (5, 16384), (4, 40_000)),
        ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)),
        (0.0, 0.1),
    ):
        logits = (torch.randn(rows, vocabulary, generator=generator) * 20).to(dtype)
        logits[:1, : vocabulary - 1] = -torch.inf  # the first steps of the first row meet nothing else
        targets = torch.randint(vocabulary, (rows,), generator=generator)
        targets[:1] = vocabulary - 1
        if rows == 5:
            targets[2], logits[2, 7] = IGNORED, torch.nan
        found, expected = logits.clone(), logits.clone()
        assert torch.equal(
            softmax_triton(found, targets, z_loss, gradient=False),
            softmax_triton(logits.clone(), targets, z_loss, gradient=True),
        )
        assert torch.equal(found.nan_to_num(7.0), logits.nan_to_num(7.0))
        losses = softmax_triton(found, targets, z_loss, gradient=True)
        expected_losses = softmax_reference(expected, targets, z_loss, gradient=True)
        assert (losses - expected_losses).abs().le(1e-5 * expected_losses.abs().clamp(min=1)).all()
        assert (
            (found.float() - expected.float()).abs().le(limit * expected.float().abs().clamp(min=1e-3)).all()
        )
    for bad, target in ((torch.nan, 0), (torch.inf, 0), (0.0, 5), (0.0, -1), (0.0, 20_000)):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        with np.errstate(invalid="ignore"):  # infinity minus infinity is meant
            losses = softmax_triton(logits, torch.tensor([1, target]), gradient=True)
        assert losses.isnan().tolist() == [False, True], (bad, target)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    check_scales(generator)
    check_spoiled_scales()
    check_floor()
    check_codes(generator)
    with guarded():
        check_e5m6(generator)
        check_permute(generator)
        check_e5m6_codes()
    check_cross_entropy(generator)
    print("interpreted kernels agree")


if __name__ == "__main__":
    main()
