"""Weight gradients apart from input gradients, into FP32 buffers, and with FP8 weights made once a step."""

import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch

from kernels.layers.grouped_linear import fp8_grouped_linear
from kernels.layers.linear import fp8_linear
from kernels.layers.mlp import fp8_experts, fp8_mlp
from kernels.layers.weight import FP8Weights
from kernels.layers.wgrad import WgradQueue

OFFSETS = torch.tensor([0, 0, 9, 140, 140])
LAYERS = ("linear", "e5m6", "grouped", "mlp", "experts")


def layer(kind: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, Callable[..., torch.Tensor]]:
    """x, weights, dy and a function (x, copies, main_grads, queue) -> y."""
    generator = torch.Generator().manual_seed(3)
    lead = (4,) if kind in ("grouped", "experts") else ()
    wide = kind in ("mlp", "experts")
    shapes = [(*lead, 260, 200), (*lead, 200, 130)] if wide else [(*lead, 72, 200)]
    weights = [
        (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).requires_grad_() for shape in shapes
    ]
    x = torch.randn(140, 200, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(140, shapes[-1][-2], generator=generator).bfloat16()
    routing = torch.rand(140, generator=generator)

    def run(x, copies=None, main_grads=None, queue=None):
        if wide:
            options = {"copies": copies, "main_grads": main_grads, "queue": queue}
            if kind == "mlp":
                return fp8_mlp(x, *weights, **options)
            return fp8_experts(x, *weights, OFFSETS, routing, **options)
        options = {"copy": copies and copies[0], "main_grad": main_grads and main_grads[0], "queue": queue}
        if kind == "grouped":
            return fp8_grouped_linear(x, *weights, OFFSETS, **options)
        return fp8_linear(x, *weights, e5m6=kind == "e5m6", **options)

    return x, weights, dy, run


def fused(kind: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of x and of the weights, all at once and by autograd alone."""
    x, weights, dy, run = layer(kind)
    dx, *dw = torch.autograd.grad(run(x), (x, *weights), dy)
    return dx, dw


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_gradients_may_come_later(kind) -> None:
    dx, dw = fused(kind)
    x, weights, dy, run = layer(kind)
    with WgradQueue() as queue:
        run(x, queue=queue).backward(dy)
        assert torch.equal(x.grad, dx)
        assert all(weight.grad is None for weight in weights)
        assert len(queue) == len(weights)
        queue.run()
        assert len(queue) == 0
        queue.run()  # nothing is added twice
        assert all(torch.equal(w.grad, g) for w, g in zip(weights, dw, strict=True))
        # And on top of what is there, as autograd adds.
        run(x.detach(), queue=queue).backward(dy)
        queue.run()
    assert all(torch.equal(w.grad, g + g) for w, g in zip(weights, dw, strict=True))


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_micro_batches_add_up_in_main_gradients(kind, queued) -> None:
    _, dw = fused(kind)
    x, weights, dy, run = layer(kind)
    main_grads = tuple(torch.full(w.shape, 0.5) for w in weights)
    queue = WgradQueue() if queued else None
    expected = [torch.full(w.shape, 0.5) for w in weights]
    for factor in (1.0, 2.0, -4.0):  # powers of two, so that gradients scale exactly
        run(x, main_grads=main_grads, queue=queue).backward(dy * factor)
        if queue is not None:
            assert len(queue) == len(weights)
            queue.run()
        for total, gradient in zip(expected, dw, strict=True):
            total += gradient * factor
    assert all(weight.grad is None for weight in weights)
    assert all(torch.equal(found, total) for found, total in zip(main_grads, expected, strict=True))


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_a_main_gradient_may_be_asked_for_when_it_is_needed(kind) -> None:
    _, dw = fused(kind)
    x, weights, dy, run = layer(kind)
    buffers: list[torch.Tensor] = []
    y = run(x, main_grads=tuple((lambda i=i: buffers[i]) for i in range(len(weights))))
    with pytest.raises(IndexError):  # nobody asked in the forward pass
        y.backward(dy, retain_graph=True)
    buffers += [torch.zeros(w.shape) for w in weights]
    y.backward(dy)
    assert all(weight.grad is None for weight in weights)
    assert all(torch.equal(found, gradient) for found, gradient in zip(buffers, dw, strict=True))
    y = run(x, main_grads=tuple((lambda i=i: buffers[i].bfloat16()) for i in range(len(weights))))
    with pytest.raises(TypeError, match=r"main_grad is torch\.bfloat16"):
        y.backward(dy)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_copy_of_the_weight_changes_no_bit_and_is_made_once(kind, monkeypatch) -> None:
    dx, dw = fused(kind)
    x, weights, dy, run = layer(kind)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with FP8Weights() as copies:
        first = tuple(copies.of(weight) for weight in weights)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = run(x, copies=first)
        found = torch.autograd.grad(y, (x, *weights), dy)
        twins = [weight.detach().view(weight.shape) for weight in weights]  # as in a replica
        assert [copies.of(twin) for twin in twins] == list(first)
    assert all(torch.equal(a, b) for a, b in zip(found, (dx, *dw), strict=True))
    pointers = {weight.data_ptr() for weight in weights}
    assert not any(tensor.data_ptr() in pointers for tensor in saved)


@pytest.mark.parametrize("kind", LAYERS)
def test_only_fp8_waits_for_the_backward_pass(kind) -> None:
    """Bytes saved, weights apart: FP8 codes with one FP32 scale for 128 of them, E5M6 in 1.5 bytes."""
    x, weights, _, run = layer(kind)
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with FP8Weights() as copies, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x, copies=tuple(copies.of(weight) for weight in weights))
    assert y.requires_grad
    rows, tiles = 140, 2
    expected = rows * (200 + 4 * tiles)
    if kind == "e5m6":
        expected = rows * (300 + 4 * tiles)
    if kind in ("mlp", "experts"):  # the inputs of SwiGLU
        expected += rows * (260 + 4 * 3)
    if kind == "experts":  # routing weights
        expected += rows * 4
    assert sum(tensor.nbytes for tensor in saved.values()) == expected


@pytest.mark.parametrize("kind", LAYERS)
def test_a_queue_holds_fp8_alone(kind) -> None:
    x, _, dy, run = layer(kind)
    queue = WgradQueue()
    gradient = dy.clone()
    y = run(x, queue=queue)
    y.backward(gradient)
    alive = [weakref.ref(tensor) for tensor in (gradient, y)]
    del gradient, y
    gc.collect()
    assert all(reference() is None for reference in alive)
    queue.clear()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_frozen_weight_or_input_computes_nothing_for_it(kind) -> None:
    dx, dw = fused(kind)
    x, weights, dy, run = layer(kind)
    queue = WgradQueue()
    run(x.detach(), queue=queue).backward(dy)
    queue.run()
    assert x.grad is None
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, dw, strict=True))
    for weight in weights:
        weight.requires_grad_(False)
    run(x, queue=queue).backward(dy)
    assert len(queue) == 0
    assert torch.equal(x.grad, dx)
    for frozen, trained in itertools.permutations(range(len(weights)), 2):
        weights[frozen].requires_grad_(False)
        weights[trained].requires_grad_(True)
        (found,) = torch.autograd.grad(run(x.detach()), weights[trained], dy)
        assert torch.equal(found, dw[trained])


@pytest.mark.parametrize("kind", LAYERS)
def test_no_second_derivative(kind) -> None:
    x, _, dy, run = layer(kind)
    (dx,) = torch.autograd.grad(run(x), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_queue_that_is_dropped_says_so() -> None:
    x, weights, dy, run = layer("linear")
    with pytest.raises(RuntimeError, match="1 weight gradients were never computed"):
        with WgradQueue() as queue:
            run(x, queue=queue).backward(dy)

    def fail() -> None:
        with WgradQueue() as queue:
            run(x, queue=queue).backward(dy)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):  # the first error is the one to see
        fail()
    queue = WgradQueue()
    run(x, queue=queue).backward(dy)
    with pytest.warns(RuntimeWarning, match="1 weight gradients were lost"):
        del queue
    assert weights[0].grad is None


def test_work_that_fails_is_not_done_again() -> None:
    queue, done = WgradQueue(), []

    def fail() -> None:
        raise ArithmeticError

    for work in (lambda: done.append(1), fail, lambda: done.append(2)):
        queue.put(work)
    with pytest.raises(ArithmeticError):
        queue.run()
    assert (done, len(queue)) == ([1], 1)
    queue.run()
    assert done == [1, 2]


def test_what_does_not_fit_is_named() -> None:
    x, weights, _, run = layer("linear")
    with pytest.raises(TypeError, match=r"main_grad is torch\.bfloat16"):
        run(x, main_grads=(torch.zeros(72, 200, dtype=torch.bfloat16),))
    with pytest.raises(ValueError, match=r"main_grad has shape \(200, 72\)"):
        run(x, main_grads=(torch.zeros(200, 72),))
    with pytest.raises(ValueError, match="main_grad is on meta"):
        run(x, main_grads=(torch.zeros(72, 200, device="meta"),))
    with pytest.raises(ValueError, match="a weight that is itself computed"):
        fp8_linear(x, weights[0] * 2, queue=WgradQueue())
    with FP8Weights() as copies:
        other = copies.of(torch.ones(72, 100))
        with pytest.raises(ValueError, match=r"copy is of a weight \(72, 100\)"):
            run(x, copies=(other,))
        with pytest.raises(ValueError, match=r"the weight has shape \(4,\)"):
            copies.of(torch.ones(4))


def test_a_copy_does_not_outlive_its_scope() -> None:
    x, weights, dy, run = layer("linear")
    with FP8Weights() as copies:
        copy = copies.of(weights[0])
        y = run(x, copies=(copy,))
    with pytest.raises(RuntimeError, match="used after its scope"):
        y.backward(dy)
    with pytest.raises(RuntimeError, match="used after its scope"):
        run(x, copies=(copy,))
    with pytest.raises(RuntimeError, match="the scope has ended"):
        copies.of(weights[0])


@pytest.mark.parametrize("fused_step", [True, False])
def test_an_optimizer_step_inside_the_scope_is_an_error(fused_step) -> None:
    """Torch does not count what a fused optimizer writes on a CPU; the end of the scope sees it."""
    x, weights, dy, run = layer("linear")
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=fused_step)

    def step() -> None:
        with FP8Weights() as copies:
            copy = copies.of(weights[0])
            run(x, copies=(copy,)).backward(dy)
            optimizer.step()
            run(x, copies=(copy,)).backward(dy)

    with pytest.raises(RuntimeError, match=r"weight \(72, 200\) was written while"):
        step()
    # In turn it is none, and the new weights count.
    for _ in range(2):
        with FP8Weights() as copies:
            y = run(x, copies=(copies.of(weights[0]),))
            assert torch.equal(y, run(x))
            y.backward(dy)
        optimizer.step()


def test_without_gradients_there_is_no_transpose() -> None:
    _, weights, _, _ = layer("experts")
    with FP8Weights() as copies:
        with torch.no_grad():
            copy = copies.of(weights[0])
        assert copy._transposed is None
        both = FP8Weights().of(weights[0])
        for one, other in ((copy.blocks(), both.blocks()), (copy.transposed(), both.transposed())):
            assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
            assert torch.equal(one.scales, other.scales)
