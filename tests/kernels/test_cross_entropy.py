"""Linear cross-entropy against torch's own in float64, and against the loss of the model."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.fused import cross_entropy
from kernels.fused.cross_entropy import IGNORED, linear_cross_entropy, softmax_reference
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
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    loss = loss + z_loss * logits.logsumexp(dim=1)[targets != IGNORED].square().sum()
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


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_ignored_positions_count_for_nothing(share, z_loss) -> None:
    states, head, targets = problem(1100, 6, 40)
    targets[torch.rand(1100, generator=torch.Generator().manual_seed(1)) < share] = IGNORED
    counted = int((targets != IGNORED).sum())
    assert (counted > 0) == (share < 1)
    expected = exact(states, head, targets, z_loss)
    for reduction, factor in (("sum", 1.0), ("mean", 1 / max(counted, 1))):
        loss = linear_cross_entropy(states, head, targets, z_loss, reduction=reduction)
        found = (loss, *torch.autograd.grad(loss, (states, head)))
        for value, wanted in zip(found, expected, strict=True):
            wanted = wanted * factor
            assert (value - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max())
        assert found[1][targets == IGNORED].eq(0).all()


def test_the_logits_of_an_ignored_position_do_not_matter() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.zeros(2, 5)
        logits[0, 3] = bad
        losses = softmax_reference(logits, torch.tensor([IGNORED, 1]), 0.1, gradient=True)
        assert losses[0] == 0
        assert losses[1].isfinite()
        assert logits[0].eq(0).all()
        assert logits[1].ne(0).all()


def test_pieces_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a BF16 head is made piece by piece."""
    states, head, targets = problem(50, 16, 130, torch.bfloat16)
    results = []
    for piece in (cross_entropy.PIECE, 37):
        monkeypatch.setattr(cross_entropy, "PIECE", piece)
        results.append(torch.autograd.grad(linear_cross_entropy(states, head, targets), head)[0])
    assert relative_error(results[1], results[0]) < 2.0**-8
    assert relative_error(results[1], exact(states, head, targets, 0.0)[2]) < 0.02


def test_memory_never_holds_all_logits() -> None:
    """No tensor as large as the logits of all positions is ever made."""
    states, head, targets = problem(4 * cross_entropy.CHUNK, 4, 50)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        linear_cross_entropy(states, head, targets).backward()
    assert largest == cross_entropy.CHUNK * 50


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
    with pytest.raises(ValueError, match='reduction is \'none\'; it must be "sum" or "mean"'):
        linear_cross_entropy(states, head, targets, reduction="none")
    for z_loss in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="z_loss is"):
            linear_cross_entropy(states, head, targets, z_loss)
    for target in (-1, 9):
        with pytest.raises(ValueError, match="they must lie in 0 to 8, or be -100"):
            linear_cross_entropy(states, head, torch.tensor([0, target, 1]))
