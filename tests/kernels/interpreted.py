"""Run by test_interpreted.py in a process of its own, under TRITON_INTERPRET=1.

Triton's CPU interpreter rounds wrongly when it casts to E4M3, so codes are compared only where the quotient
is itself an E4M3 value and the cast has nothing to round. Scales, masks, addresses and the GEMM need no such
care.
"""

import itertools

import torch

from kernels.gemm import gemm_reference, gemm_triton
from kernels.metrics import relative_error
from kernels.quantize import (
    BLOCKS,
    TILES,
    Quantized,
    quantize_blocks_triton,
    quantize_reference,
    quantize_tiles_triton,
)

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


def check_gemm(generator: torch.Generator) -> None:
    # 1100 rows are more than one band of output tiles.
    for (m, n, k), block in itertools.product(
        ((1, 1, 1), (7, 129, 200), (129, 300, 385), (1100, 130, 128)), (BLOCKS, TILES)
    ):
        a = quantize_reference(torch.randn(m, k, generator=generator), TILES)
        b = quantize_reference(torch.randn(n, k, generator=generator), block)
        a = Quantized(
            a.codes, a.scales * 2.0 ** torch.randint(-9, 9, a.scales.shape, generator=generator), TILES
        )
        b = Quantized(
            b.codes, b.scales * 2.0 ** torch.randint(-9, 9, b.scales.shape, generator=generator), block
        )
        error = relative_error(gemm_triton(a, b), gemm_reference(a, b).double())
        assert error < 1e-6, (m, n, k, block, error)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    check_scales(generator)
    check_spoiled_scales()
    check_floor()
    check_codes(generator)
    check_gemm(generator)
    print("interpreted kernels agree")


if __name__ == "__main__":
    main()
