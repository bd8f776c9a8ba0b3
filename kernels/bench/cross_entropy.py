"""Output projection and cross-entropy, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.shapes import HIDDEN, TOKENS, VOCABULARY
from kernels.fused import cross_entropy
from kernels.metrics import relative_error

CHECKED = ((1, 64, 7), (7, 33, 129), (129, 64, 4097), (600, 16, 200))  # positions, hidden, vocabulary
TIMED = [Shape("output head", (TOKENS[0], HIDDEN, VOCABULARY))]
# Logits rounded to BF16 are wrong by 2**-9 of their size, and so are the probabilities made from them.
MAX_ERROR_FP32, MAX_ERROR_BF16 = 1e-5, 2e-2

Results = tuple[torch.Tensor, ...]


def flops(positions: int, hidden: int, vocabulary: int) -> int:
    """Three products: the logits, and the gradients of states and head."""
    return 6 * positions * hidden * vocabulary


def moved(positions: int, hidden: int, vocabulary: int, width: int) -> int:
    """Bytes of states and head, of their gradients, and of the targets."""
    return 2 * width * (positions + vocabulary) * hidden + 8 * positions


def make(draw: Draw, positions: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
    states = draw.values(positions, hidden, dtype=dtype)
    head = (draw.values(vocabulary, hidden) * 0.5 * hidden**-0.5).to(dtype)
    return states, head, draw.integers(vocabulary, positions)


def forward_and_back(
    loss_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
) -> Results:
    leaves = (states.detach().requires_grad_(), head.detach().requires_grad_())
    loss = loss_of(*leaves, targets)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def plain(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(states @ head.t(), targets, reduction="sum")


def eager(*inputs: torch.Tensor) -> Callable[[], Results]:
    return lambda: forward_and_back(plain, *inputs)


def error(inputs: Inputs, found: Results) -> float:
    states, head, targets = inputs
    exact = forward_and_back(plain, states.double(), head.double(), targets)
    return max(relative_error(ours, other) for ours, other in zip(found, exact, strict=True))


def entry(operands: str, dtype: torch.dtype, timed: Sequence[Shape] = ()) -> Entry:
    return Entry(
        "linear_cross_entropy",
        operands,
        partial(make, dtype=dtype),
        lambda *inputs: forward_and_back(cross_entropy.linear_cross_entropy, *inputs),
        error,
        f"relative error of loss and gradients, {operands}",
        MAX_ERROR_BF16 if dtype == torch.bfloat16 else MAX_ERROR_FP32,
        CHECKED,
        moved=partial(moved, width=dtype.itemsize),
        flops=flops,
        exact=(),
        kernel="softmax_triton",
        timed=timed,
        small=None if timed else (512, 128, 2048),
        unit="TFLOPS",
        peers=[Peer("F.cross_entropy of all logits", eager, "any")],
    )


ENTRIES = [entry("BF16", torch.bfloat16, TIMED), entry("FP32", torch.float32)]
