"""The error metric: its value, and that nothing bad passes it."""

import math

import pytest
import torch

from kernels.metrics import relative_error


def test_is_the_frobenius_ratio() -> None:
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])) == pytest.approx(0.75)


def test_is_computed_in_float64() -> None:
    reference = torch.full((4,), 2.0**100, dtype=torch.float64)
    assert relative_error(reference * (1 + 2.0**-40), reference) == pytest.approx(2.0**-40, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_fail_every_limit(bad: float) -> None:
    good, spoiled = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    for value, reference in ((spoiled, good), (good, spoiled), (spoiled, spoiled), (spoiled, torch.zeros(3))):
        assert not relative_error(value, reference) < 1e9


def test_zero_reference() -> None:
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.tensor([0.0, 1e-30]), torch.zeros(2)) == math.inf


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(3, 3\)"):
        relative_error(torch.ones(3, 1), torch.ones(3, 3))
