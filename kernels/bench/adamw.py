"""The optimizer's step and the norm of the gradients: adamw.py, grad_norm.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.metrics import MAX_ROUNDING_BF16, relative_error
from kernels.optim import adamw, grad_norm
from kernels.optim.tensor_table import TensorTable

LR, BETAS, EPS, DECAY, STEP = 1e-2, (0.9, 0.95), 1e-8, 0.1, 3
CHECKED = ((1, 1), (129, 7), (40000, 3), (10, 20))  # elements, tensors (of which some may be empty)
TIMED = [Shape("one tensor", (2**27, 1)), Shape("1000 tensors", (2**27, 1000))]
MAX_ERROR_FP32 = 1e-3  # of the update, which may be small beside the weight that it is rounded with

Tensors = tuple[torch.Tensor, ...]


def moved_step(elements: int, count: int) -> int:
    """Bytes of weights and gradients in FP32 and both moments in BF16, and of the new weights and moments."""
    return elements * (12 + 8)


def moved_copy(elements: int, count: int) -> int:
    """With a BF16 copy of the weights written too."""
    return elements * (12 + 8 + 2)


def moved_norm(elements: int, count: int) -> int:
    """Bytes of FP32 gradients."""
    return elements * 4


def cut(flat: torch.Tensor, count: int) -> Tensors:
    """`flat` in `count` tensors of unequal sizes, each at an address of its own."""
    ends = [len(flat) * (i + 1) ** 2 // count**2 for i in range(count)]
    return tuple(flat[begin:end].clone() for begin, end in zip([0, *ends], ends, strict=False))


def make_step(draw: Draw, elements: int, count: int) -> Inputs:
    """Weights, gradients, means and squares, as tuples of tensors, and the kernel's table of them."""
    weights, grads, means = (cut(draw.values(elements), count) for _ in range(3))
    squares = cut(draw.values(elements).square().add_(1e-3), count)
    return (
        weights,
        grads,
        tuple(mean.bfloat16() for mean in means),
        tuple(square.bfloat16() for square in squares),
        TensorTable(),
    )


def make_norm(draw: Draw, elements: int, count: int) -> Inputs:
    return cut(draw.values(elements), count), TensorTable()


def step(
    weights: Tensors, grads: Tensors, means: Tensors, squares: Tensors, table: TensorTable, copies: Any = None
) -> tuple[Tensors, Tensors]:
    """The new weights, and both moments."""
    adamw.adamw_step(
        weights, grads, means, squares, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, step=STEP,
        copies=copies, table=table,
    )  # fmt: skip
    return weights, (*means, *squares)


def step_with_copies(*inputs: Any) -> Tensors:
    copies = tuple(torch.empty_like(weight, dtype=torch.bfloat16) for weight in inputs[0])
    step(*inputs, copies=copies)
    return copies


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def exact(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights before, and weights, means and squares after a step in float64, by the textbook formula."""
    weight, grad, mean, square = (joined(column) for column in inputs[:4])
    mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
    square = BETAS[1] * square + (1 - BETAS[1]) * grad**2
    corrected = (square / (1 - BETAS[1] ** STEP)).sqrt() + EPS
    after = weight * (1 - LR * DECAY) - LR * mean / (1 - BETAS[0] ** STEP) / corrected
    return weight, after, mean, square


def error_update(inputs: Inputs, found: Tensors) -> float:
    before, after, _, _ = exact(inputs)
    return relative_error(joined(found) - before, after - before)


def error_moments(inputs: Inputs, found: Tensors) -> float:
    _, _, mean, square = exact(inputs)
    sizes = [weight.numel() for weight in inputs[0]]
    parts = (*mean.split(sizes), *square.split(sizes))
    return max(relative_error(ours.flatten(), part) for ours, part in zip(found, parts, strict=True))


def error_copies(inputs: Inputs, found: Tensors) -> float:
    return relative_error(joined(found), exact(inputs)[1])


def error_norm(inputs: Inputs, found: torch.Tensor) -> float:
    return relative_error(found, torch.linalg.vector_norm(joined(inputs[0])))


def fused(weights: Tensors, grads: Tensors, *_: Any) -> Callable[[], object]:
    """torch's fused AdamW, whose moments are FP32: 28 bytes an element where ours moves 20."""
    parameters = [weight.clone().requires_grad_() for weight in weights]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True, foreach=False
    )

    def call() -> Tensors:
        optimizer.step()
        return tuple(parameters)

    return call


def total_norm(grads: Tensors, _: TensorTable) -> Callable[[], torch.Tensor]:
    return lambda: torch.nn.utils.get_total_norm(grads, foreach=True)


def entry(
    operands: str,
    call: Callable[..., Any],
    error: Callable[[Inputs, Any], float],
    measure: str,
    limit: float,
    moved: Callable[..., int] = moved_step,
    timed: Sequence[Shape] = (),
) -> Entry:
    return Entry(
        "adamw_step",
        operands,
        make_step,
        call,
        error,
        measure,
        limit,
        CHECKED,
        moved=moved,
        timed=timed,
        small=(2**20, 10) if timed else None,
        peers=[Peer("torch's fused AdamW", fused, "any", alike=False)],
        share=0.8,
    )


ENTRIES = [
    entry(
        "FP32 gradients",
        lambda *inputs: step(*inputs)[0],
        error_update,
        "relative error of the update",
        MAX_ERROR_FP32,
        timed=TIMED,
    ),
    entry(
        "moments",
        lambda *inputs: step(*inputs)[1],
        error_moments,
        "relative error of the moments, BF16",
        MAX_ROUNDING_BF16,
    ),
    entry(
        "with a BF16 copy",
        step_with_copies,
        error_copies,
        "relative error of the copy, BF16",
        MAX_ROUNDING_BF16,
        moved_copy,
    ),
    Entry(
        "grad_norm",
        "FP32",
        make_norm,
        lambda grads, table: grad_norm.grad_norm(grads, table=table),
        error_norm,
        "relative error",
        1e-5,
        CHECKED,
        moved=moved_norm,
        timed=TIMED,
        small=(2**20, 10),
        peers=[Peer("torch's get_total_norm", total_norm, "any")],
        share=0.8,
    ),
]
