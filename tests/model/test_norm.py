"""RMSNorm with its hand-written backward against torch."""

import pytest
import torch
from torch.nn import functional as F

from model.norm import RMSNorm


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 4, 12), (0, 12)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_forward_and_backward_are_those_of_torch(shape, scale):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(12, 1e-6)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
    x = (scale * torch.randn(shape, generator=generator)).requires_grad_()
    aim = torch.randn(shape, generator=generator)
    y = norm(x)
    (y * aim).sum().backward()
    x64 = x.detach().double().requires_grad_()
    w64 = norm.weight.detach().double().requires_grad_()
    expected = F.rms_norm(x64, (12,), w64, 1e-6)
    (expected * aim.double()).sum().backward()
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5 / scale)
    assert torch.allclose(norm.weight.grad.double(), w64.grad, rtol=1e-4, atol=1e-5)


def test_bfloat16_in_and_out_with_statistics_in_float32():
    x = (300 * torch.randn(4, 64, generator=torch.Generator().manual_seed(1))).bfloat16().requires_grad_()
    norm = RMSNorm(64, 1e-6)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    expected = F.rms_norm(x.detach().float(), (64,), norm.weight, 1e-6)
    assert torch.equal(y, expected.bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32


def test_a_row_of_zeros_gives_zeros_and_a_finite_gradient():
    norm = RMSNorm(8, 1e-6)
    x = torch.zeros(2, 8, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(x.grad).all()
