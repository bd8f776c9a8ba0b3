"""Operations of the references that must be correctly rounded on every machine."""

import torch

from kernels.formats.exact import square_root_


def test_square_roots_are_correctly_rounded() -> None:
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(
        -149, 101
    ).repeat(40)
    x[:4] = torch.tensor([0.0, torch.inf, torch.nan, 2.0**-149])
    # A root of 53 bits is never so near the middle of two FP32 numbers that rounding it again could err.
    expected = x.double().sqrt().float()
    found = square_root_(x)
    assert found is x
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert square_root_(torch.tensor([-1.0])).isnan()
