"""Linear cross-entropy against torch's own in float64, and against the loss of the model."""

import pytest
import torch

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy, softmax_reference
from kernels.metrics import relative_error
from model.loss import cross_entropy_sum


def problem(
    positions: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, hidden, generator=generator).to(dtype)
    head = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return states.requires_grad_(), head.requires_grad_(), targets


def exact(
    states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, ...]:
    """Loss and gradients in float64, from all logits at once."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (states, head)]
    logits = leaves[0] @ leaves[1].t()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss = loss + z_loss * logits.logsumexp(dim=1).square().sum()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (512, 8, 31), (513, 17, 130), (1100, 3, 70)])
def test_loss_and_gradients_against_float64(shape, z_loss) -> None:
    states, head, targets = problem(*shape)
    loss = linear_cross_entropy(states, head, targets, z_loss)
    found = (loss, *torch.autograd.grad(loss, (states, head)))
    assert loss.dtype == torch.float32
    for value, expected in zip(found, exact(states, head, targets, z_loss), strict=True):
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


def test_bf16_errors_are_those_of_its_rounding() -> None:
    states, head, targets = problem(700, 64, 300, torch.bfloat16)
    loss = linear_cross_entropy(states, head, targets, 1e-4)
    grads = torch.autograd.grad(loss, (states, head))
    expected = exact(states, head, targets, 1e-4)
    assert relative_error(loss, expected[0]) < 1e-3
    for grad, wanted in zip(grads, expected[1:], strict=True):
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, wanted) < 0.02


def test_it_is_the_loss_of_the_model() -> None:
    states, head, targets = problem(600, 16, 90)
    results = []
    for function in (linear_cross_entropy, cross_entropy_sum):
        loss = function(states, head, targets)
        results.append((loss, *torch.autograd.grad(loss, (states, head))))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-6


def test_the_factor_of_the_gradient_is_not_rounded() -> None:
    states, head, targets = problem(4, 8, 20, torch.bfloat16)
    loss = linear_cross_entropy(states, head, targets)
    whole = torch.autograd.grad(loss, states, retain_graph=True)[0]
    third = torch.autograd.grad(loss / 3, states)[0]
    assert torch.equal(third, (whole.float() / 3).to(torch.bfloat16))


def test_only_wanted_gradients_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(logits, targets, z_loss, *, gradient):
        asked.append(gradient)
        return softmax_reference(logits, targets, z_loss, gradient=gradient)

    monkeypatch.setattr(cross_entropy, "softmax_reference", spy)
    states, head, targets = problem(5, 4, 9)
    full = torch.autograd.grad(linear_cross_entropy(states, head, targets), (states, head))
    alone = linear_cross_entropy(states, head.detach(), targets)
    assert torch.equal(torch.autograd.grad(alone, states)[0], full[0])
    alone = linear_cross_entropy(states.detach(), head, targets)
    assert torch.equal(torch.autograd.grad(alone, head)[0], full[1])
    with torch.no_grad():
        assert not linear_cross_entropy(states, head, targets).requires_grad
    assert not linear_cross_entropy(states.detach(), head.detach(), targets).requires_grad
    assert asked == [True, True, True, False, False]


def test_master_weights_keep_their_type() -> None:
    states, head, targets = problem(5, 4, 9, torch.bfloat16)
    master = head.detach().float().requires_grad_()
    grads = torch.autograd.grad(linear_cross_entropy(states, master, targets), (states, master))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


def test_large_logits_do_not_overflow() -> None:
    states = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    head = torch.tensor([[1.0], [0.5], [-1.0]])
    loss = linear_cross_entropy(states, head, torch.tensor([0, 0]))
    assert loss.item() == 2e4
    assert torch.autograd.grad(loss, states)[0].tolist() == [[0.0], [-2.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_surface(bad) -> None:
    states, head, targets = problem(6, 4, 9)
    with torch.no_grad():
        states[3, 2] = bad
    assert linear_cross_entropy(states, head, targets).isnan()


def test_no_positions() -> None:
    states, head, targets = problem(0, 4, 9)
    loss = linear_cross_entropy(states, head, targets)
    loss.backward()
    assert loss == 0
    assert states.grad.shape == (0, 4)
    assert torch.equal(head.grad, torch.zeros(9, 4))


def test_bad_input_is_named() -> None:
    states, head, targets = problem(3, 4, 9)
    for arguments in (
        (states[0], head, targets),
        (states, head[:, :3], targets),
        (states, head, targets[:2]),
        (states, head[:0], targets),
    ):
        with pytest.raises(ValueError, match="they must be"):
            linear_cross_entropy(*arguments)
    with pytest.raises(TypeError, match=r"type of states is torch\.float64"):
        linear_cross_entropy(states.double(), head, targets)
    with pytest.raises(TypeError, match=r"type of head is torch\.float16"):
        linear_cross_entropy(states, head.half(), targets)
    with pytest.raises(TypeError, match=r"targets are torch\.int32"):
        linear_cross_entropy(states, head, targets.int())
    with pytest.raises(ValueError, match="head on meta"):
        linear_cross_entropy(states, head.to("meta"), targets)
    for z_loss in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="z_loss is"):
            linear_cross_entropy(states, head, targets, z_loss)
    for target in (-1, 9):
        with pytest.raises(ValueError, match="they must lie in 0 to 8"):
            linear_cross_entropy(states, head, torch.tensor([0, target, 1]))
