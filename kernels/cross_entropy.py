"""Output projection and cross-entropy in one step that never holds the logits of all positions.

    logits = states @ head.T                       of CHUNK positions at a time
    lse    = log(sum(exp(logits)))
    loss   = lse - logits[target] + z_loss * lse**2        summed over positions, in nats
    dloss / dlogits = softmax * (1 + 2 * z_loss * lse) - onehot(target)

The gradient overwrites the logits of its chunk and is at once multiplied into the gradients of the states and
of the head, in the forward pass. So the memory is that of one chunk (126 MiB in BF16 for a vocabulary of
129,280; the reference adds FP32 copies of it) and of the two gradients. The z-loss, off by default, keeps lse
near 0 (PaLM, section 5, uses 1e-4).

Logits have the type of the states and are read as FP32; maxima, sums and losses are FP32. On a GPU the exp
and log are the hardware's, so kernel and reference agree to rounding, not bit for bit. A NaN or plus infinity
among the logits makes the loss NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.backend import jit, runs_triton, tl

CHUNK = 512  # positions whose logits exist at one time
BLOCK = 4096  # logits of a row that one step of the kernel reads
OPTIONS = {"num_warps": 8}


def linear_cross_entropy(
    states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Sum over positions (FP32 scalar) of the cross-entropy of states @ head.T against targets, in nats.

    states is [positions, hidden], head [vocabulary, hidden], each FP32 or BF16, targets [positions] (int64),
    all on one device. The head is cast to the type of the states. Each gradient has the type of its tensor;
    that of the head is summed over chunks in FP32. There may be no positions: loss and gradients are then 0.

    On a GPU a target outside the vocabulary makes the loss NaN, since an error would wait for the device.

    Raises:
        ValueError, TypeError: shapes, types, devices, `z_loss` or, on a CPU, a target do not fit.
        RuntimeError: the tensors are on a GPU that the kernels do not support.
    """
    _check(states, head, targets, z_loss)
    # Inside a Function gradients look wanted even under no_grad, so whether they are is decided out here.
    enabled = torch.is_grad_enabled()
    wanted = (enabled and states.requires_grad, enabled and head.requires_grad)
    return _LinearCrossEntropy.apply(states, head, targets, z_loss, wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        z_loss: float,
        wanted: tuple[bool, bool],
    ) -> torch.Tensor:
        softmax = softmax_triton if runs_triton(states) else softmax_reference
        total = states.new_zeros((), dtype=torch.float32)
        grad_states = torch.empty_like(states) if wanted[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] else None
        weight = head.to(states.dtype)
        for start in range(0, states.shape[0], CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = states[chunk] @ weight.t()
            total += softmax(logits, targets[chunk], z_loss, gradient=any(wanted)).sum()
            if wanted[0]:
                grad_states[chunk] = logits @ weight
            if wanted[1] and logits.dtype == torch.float32:
                grad_head.addmm_(logits.t(), states[chunk])
            elif wanted[1]:
                grad_head += logits.t() @ states[chunk]
        ctx.save_for_backward(grad_states, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_states, grad_head = ctx.saved_tensors
        # The factor stays FP32: in BF16 it alone would be wrong by up to 0.4%.
        by_states = None if grad_states is None else (grad_states.float() * grad).to(grad_states.dtype)
        by_head = None if grad_head is None else (grad_head * grad).to(ctx.head_dtype)
        return by_states, by_head, None, None, None


def softmax_reference(
    logits: torch.Tensor, targets: torch.Tensor, z_loss: float = 0.0, *, gradient: bool
) -> torch.Tensor:
    """Losses (FP32 [rows]) of `logits` [rows, vocabulary]; with `gradient` they become their gradient.

    The PyTorch reference, on any device. Without `gradient` the logits stay as they are.
    """
    values = logits.float()
    lse = values.logsumexp(dim=1)
    losses = lse - values.gather(1, targets[:, None])[:, 0] + z_loss * lse * lse
    if gradient:
        values = values.sub_(lse[:, None]).exp_().mul_((1 + 2 * z_loss * lse)[:, None])
        values.scatter_add_(1, targets[:, None], values.new_full((len(targets), 1), -1.0))
        if values is not logits:
            logits.copy_(values)
    return losses


def softmax_triton(
    logits: torch.Tensor, targets: torch.Tensor, z_loss: float = 0.0, *, gradient: bool
) -> torch.Tensor:
    """The Triton kernel of `softmax_reference`, over contiguous logits."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows > 0:
        with torch.cuda.device_of(logits):
            softmax_kernel[(rows,)](
                logits, targets.contiguous(), losses, vocabulary, z_loss,
                GRADIENT=gradient, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return losses


def _check(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, z_loss: float) -> None:
    shapes = f"states are {tuple(states.shape)}, head {tuple(head.shape)}, targets {tuple(targets.shape)}"
    if (
        (states.dim(), head.dim(), targets.dim()) != (2, 2, 1)
        or states.shape[1] != head.shape[1]
        or states.shape[0] != targets.shape[0]
        or head.shape[0] == 0
    ):
        raise ValueError(
            f"linear_cross_entropy: {shapes}; they must be [positions, hidden], [vocabulary, hidden] "
            "and [positions], with a vocabulary of at least 1"
        )
    for name, tensor in (("states", states), ("head", head)):
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"linear_cross_entropy: the type of {name} is {tensor.dtype}; "
                "use torch.float32 or torch.bfloat16"
            )
    if targets.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: targets are {targets.dtype}; pass torch.int64")
    if not states.device == head.device == targets.device:
        raise ValueError(
            f"linear_cross_entropy: states are on {states.device}, head on {head.device} and targets on "
            f"{targets.device}; move them to one device"
        )
    if not (math.isfinite(z_loss) and z_loss >= 0):
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss}; it must be finite and at least 0")
    if targets.device.type == "cpu" and targets.numel() > 0:
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= head.shape[0]:
            raise ValueError(
                f"linear_cross_entropy: targets reach from {low} to {high}; "
                f"they must lie in 0 to {head.shape[0] - 1}"
            )


@jit
def softmax_kernel(
    logits, targets, losses, vocabulary, z_loss,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, read once for the maximum and sum, and once more for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * vocabulary
    target = tl.load(targets + row)
    biggest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    picked = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        col = start + tl.arange(0, BLOCK)
        values = tl.load(at + col, mask=col < vocabulary, other=float("-inf")).to(tl.float32)
        bigger = tl.maximum(biggest, tl.max(values, axis=0))
        # While all are minus infinity, subtracting their maximum would make NaN of what is still to come.
        base = tl.where(bigger == float("-inf"), 0.0, bigger)
        total = total * tl.exp(biggest - base) + tl.sum(tl.exp(values - base), axis=0)
        # Summed here, not loaded alone: below, other threads overwrite it.
        picked += tl.sum(tl.where(col == target, values, 0.0), axis=0)
        biggest = bigger
    lse = biggest + tl.log(total)
    loss = lse - picked + z_loss * lse * lse
    exists = (target >= 0) & (target < vocabulary)
    tl.store(losses + row, tl.where(exists, loss, float("nan")))
    if GRADIENT:
        factor = 1.0 + 2.0 * z_loss * lse
        for start in range(0, vocabulary, BLOCK):
            col = start + tl.arange(0, BLOCK)
            values = tl.load(at + col, mask=col < vocabulary, other=0.0).to(tl.float32)
            grad = tl.exp(values - lse) * factor - tl.where(col == target, 1.0, 0.0)
            tl.store(at + col, grad.to(logits.dtype.element_ty), mask=col < vocabulary)
