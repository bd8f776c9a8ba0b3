"""The norm of a list of gradients, and the scale that clips it."""

import pytest
import torch

from kernels.formats.exact import row_sums
from kernels.optim import grad_norm as module
from kernels.optim.grad_norm import clip_scale, grad_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [[(3,)], [()], [(300, 129), (0,), (7,), (), (600_000,)], [(8192,)] * 3])
def test_norm_against_float64(shapes, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    exact = torch.cat([grad.double().view(-1) for grad in grads]).norm()
    found = grad_norm(grads)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert float(found) == pytest.approx(float(exact), rel=2e-7)


def test_the_order_of_the_sum_is_fixed() -> None:
    grads = [torch.randn(20_000, generator=torch.Generator().manual_seed(1)), torch.ones(5)]
    chunks = torch.zeros(4, 8192)
    for row, part in enumerate([*grads[0].split(8192), grads[1]]):
        chunks[row, : part.numel()] = part
    sums = torch.nn.functional.pad(row_sums(chunks * chunks), (0, 8188))
    expected = row_sums(sums[None]).double().sqrt().float()
    assert torch.equal(grad_norm(grads), expected[0])


def test_more_chunks_than_one_sum_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1024)
    grads = [torch.full((1,), 2.0)] * 3000
    assert float(grad_norm(grads)) == pytest.approx(2 * 3000**0.5, rel=1e-6)


def test_no_elements_have_norm_zero() -> None:
    assert float(grad_norm([])) == 0
    assert float(grad_norm([torch.empty(0), torch.empty(3, 0)])) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_what_is_not_finite_surfaces(bad) -> None:
    norm = grad_norm([torch.ones(9000), torch.tensor([1.0, bad])])
    assert not norm.isfinite()
    assert clip_scale(norm, 1.0).isnan()


def test_scales_bound_the_norm() -> None:
    for value in (0.0, 0.5, 2.0):
        norm = torch.tensor(value)
        scale = clip_scale(norm, 2.0)
        assert float(scale) == pytest.approx(1.0, rel=1e-6)
        assert float(scale) <= 1
    assert float(clip_scale(torch.tensor(8.0), 2.0)) == pytest.approx(0.25, rel=1e-6)
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip_scale: limit is"):
            clip_scale(torch.tensor(1.0), limit)


def test_errors_name_the_fault() -> None:
    with pytest.raises(TypeError, match=r"grad_norm: grads\[0\] is torch\.float64"):
        grad_norm([torch.ones(3).double()])
    with pytest.raises(TypeError, match=r"grads\[1\] is torch\.bfloat16; gradients are all"):
        grad_norm([torch.ones(3), torch.ones(3).bfloat16()])
    with pytest.raises(ValueError, match=r"grads\[1\] is on meta and grads\[0\] on cpu"):
        grad_norm([torch.ones(3), torch.ones(3, device="meta")])
    with pytest.raises(ValueError, match=r"grads\[1\] is not contiguous"):
        grad_norm([torch.ones(3), torch.ones(3, 4).t()])
