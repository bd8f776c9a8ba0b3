"""Output projection and cross-entropy in one step that never holds the logits of all positions.

    logits = states @ head.T                       of a chunk of positions at a time
    lse    = log(sum(exp(logits)))
    loss   = lse - logits[target] + z_loss * lse**2        of each position, in nats
    dloss / dlogits = softmax * (1 + 2 * z_loss * lse) - onehot(target)

A position whose target is IGNORED counts for nothing: its loss and gradient are zero, whatever its logits.

The gradient overwrites the logits of its chunk and is at once multiplied into the gradients of the states and
of the head, in the forward pass. So the memory is that of one chunk's logits and of the two gradients, that
of the head in FP32. The z-loss, off by default, keeps lse near 0 (PaLM, section 5, uses 1e-4).

Logits have the type of the states and are read as FP32; maxima, sums and losses are FP32. On a GPU the exp
and log are the hardware's, so kernel and reference agree to rounding, not bit for bit. A NaN or plus infinity
among the logits of a position that counts makes the loss NaN.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from kernels.backend import jit, runs_triton, tl

IGNORED = -100  # the target of a position that does not count, as in torch.nn.functional.cross_entropy

# Positions whose logits exist at one time. Each chunk reads and writes the FP32 gradient of the head, so
# those of a GPU are larger: their BF16 logits take 1.0 GiB at a vocabulary of 129,280. With 2048 positions
# they take half, and 4096 x 7168 takes 38 ms in place of 35 on an H200. On a CPU the reference makes FP32
# copies of them.
CHUNK = 512
GPU_CHUNK = 4096
PIECE = 16384  # rows of the head whose gradient is computed at one time

STEP_BYTES = 2**15  # bytes of a row that one step of the kernel reads: 32 a thread; with 64, FP32 spills
# Few programs of many threads: most of the rows in flight then stay in the L2 cache for the second reading.
OPTIONS = {"num_warps": 32}


def linear_cross_entropy(
    states: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float = 0.0,
    *,
    reduction: Literal["sum", "mean"] = "sum",
) -> torch.Tensor:
    """The cross-entropy of states @ head.T against targets, in nats: an FP32 scalar.

    states is [positions, hidden], head [vocabulary, hidden], each FP32 or BF16, targets [positions] (int64),
    all on one device. The head is cast to the type of the states. Each gradient has the type of its tensor;
    the parts that chunks add to that of the head are summed in FP32, on a CPU rounded to the type of the
    states before.

    `reduction` is "sum", over the positions that count (all whose target is not IGNORED, -100), or "mean",
    that sum divided by their number. Where none counts, or there are no positions, loss and gradients are 0.
    Over micro-batches or ranks that count unlike numbers of positions, only sums add up to the whole.

    On a GPU a target outside the vocabulary makes the loss NaN, since an error would wait for the device.

    Raises:
        ValueError, TypeError: shapes, types, devices, options or, on a CPU, a target do not fit.
        RuntimeError: the tensors are on a GPU that the kernels do not support.
    """
    _check(states, head, targets, z_loss)
    if reduction not in ("sum", "mean"):
        raise ValueError(f'linear_cross_entropy: reduction is {reduction!r}; it must be "sum" or "mean"')
    # Inside a Function gradients look wanted even under no_grad, so whether they are is decided out here.
    enabled = torch.is_grad_enabled()
    wanted = (enabled and states.requires_grad, enabled and head.requires_grad)
    total = _LinearCrossEntropy.apply(states, head, targets, z_loss, wanted)
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)


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
        on_gpu = runs_triton(states)
        softmax, size = (softmax_triton, GPU_CHUNK) if on_gpu else (softmax_reference, CHUNK)
        total = states.new_zeros((), dtype=torch.float32)
        grad_states = torch.empty_like(states) if wanted[0] else None
        # On a GPU the sum is kept in FP32 inside the product of BF16 matrices; the first one writes it.
        inside = on_gpu and states.dtype == torch.bfloat16 and states.shape[0] > 0
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] and not inside else None
        weight = head.to(states.dtype)
        for start in range(0, states.shape[0], size):
            chunk = slice(start, start + size)
            logits = states[chunk] @ weight.t()
            total += softmax(logits, targets[chunk], z_loss, gradient=any(wanted)).sum()
            if wanted[0]:
                grad_states[chunk] = logits @ weight
            if wanted[1] and inside:
                if grad_head is None:
                    grad_head = torch.mm(logits.t(), states[chunk], out_dtype=torch.float32)
                else:
                    torch.addmm(grad_head, logits.t(), states[chunk], out_dtype=torch.float32, out=grad_head)
            elif wanted[1] and logits.dtype == torch.float32:
                grad_head.addmm_(logits.t(), states[chunk])
            elif wanted[1]:
                # In pieces, or the products of a chunk would take as much memory as the head.
                for first in range(0, head.shape[0], PIECE):
                    piece = slice(first, first + PIECE)
                    grad_head[piece] += logits[:, piece].t() @ states[chunk]
        ctx.save_for_backward(grad_states, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_states, grad_head = ctx.saved_tensors
        # The factor stays FP32: in BF16 it alone would be wrong by up to 0.4%.
        by_states = None if grad_states is None else (grad_states.float() * grad).to(grad_states.dtype)
        by_head = None
        if grad_head is not None:
            # Rounded as it is written: the product in FP32 would be another 3.5 GiB, written and read again.
            by_head = torch.mul(grad_head, grad, out=torch.empty_like(grad_head, dtype=ctx.head_dtype))
        return by_states, by_head, None, None, None


def softmax_reference(
    logits: torch.Tensor, targets: torch.Tensor, z_loss: float = 0.0, *, gradient: bool
) -> torch.Tensor:
    """Losses (FP32 [rows]) of `logits` [rows, vocabulary]; with `gradient` they become their gradient.

    The PyTorch reference, on any device. Without `gradient` the logits stay as they are.
    """
    values = logits.float()
    ignored = targets == IGNORED
    at = targets.masked_fill(ignored, 0)[:, None]
    lse = values.logsumexp(dim=1)
    losses = (lse - values.gather(1, at)[:, 0] + z_loss * lse * lse).masked_fill_(ignored, 0.0)
    if gradient:
        values = values.sub_(lse[:, None]).exp_().mul_((1 + 2 * z_loss * lse)[:, None])
        values.scatter_add_(1, at, values.new_full((len(targets), 1), -1.0))
        values[ignored] = 0.0
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
                IGNORED=IGNORED, GRADIENT=gradient, BLOCK=STEP_BYTES // logits.element_size(),
                GROUP=16 // logits.element_size(), **OPTIONS,
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
        low, high = (int(end) for end in targets.masked_fill(targets == IGNORED, 0).aminmax())
        if low < 0 or high >= head.shape[0]:
            raise ValueError(
                f"linear_cross_entropy: targets reach from {low} to {high}; "
                f"they must lie in 0 to {head.shape[0] - 1}, or be {IGNORED}"
            )


@jit
def softmax_kernel(
    logits, targets, losses, vocabulary, z_loss,
    IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: one row, read once for the maximum and sum, and once more for the gradient.

    GROUP logits, 16 bytes, are what one thread loads. Each keeps a maximum and a sum of its own, so that no
    thread waits for another before the end of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * vocabulary
    inner = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    target = tl.load(targets + row)
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                nothing = tl.zeros((BLOCK // GROUP, GROUP), logits.dtype.element_ty)
                tl.store(at + start + inner, nothing, mask=start + inner < vocabulary)
    else:
        exists = (target >= 0) & (target < vocabulary)
        picked = tl.load(at + target, mask=exists, other=float("nan")).to(tl.float32)
        biggest = tl.full((BLOCK // GROUP,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK // GROUP,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            col = start + inner
            values = tl.load(at + col, mask=col < vocabulary, other=float("-inf")).to(tl.float32)
            bigger = tl.maximum(biggest, tl.max(values, axis=1))
            # While all are minus infinity, subtracting their maximum would make NaN of what is still to come.
            base = tl.where(bigger == float("-inf"), 0.0, bigger)
            total = total * tl.exp(biggest - base) + tl.sum(tl.exp(values - base[:, None]), axis=1)
            biggest = bigger
        top = tl.max(biggest, axis=0)
        base = tl.where(top == float("-inf"), 0.0, top)
        lse = top + tl.log(tl.sum(total * tl.exp(biggest - base), axis=0))
        tl.store(losses + row, lse - picked + z_loss * lse * lse)
        if GRADIENT:
            tl.debug_barrier()  # every thread has read the logit of the target: it may be overwritten
            factor = 1.0 + 2.0 * z_loss * lse
            last = (vocabulary - 1) // BLOCK
            for step in range(0, last + 1):
                # Backwards: what was read last is what the cache still holds.
                col = (last - step) * BLOCK + inner
                values = tl.load(at + col, mask=col < vocabulary, other=0.0).to(tl.float32)
                grad = tl.exp(values - lse) * factor
                tl.store(at + col, grad.to(logits.dtype.element_ty), mask=col < vocabulary)
            tl.debug_barrier()  # the gradient of the target is written after that of all logits
            grad = tl.exp(picked - lse) * factor - 1.0
            tl.store(at + target, grad.to(logits.dtype.element_ty), mask=exists)
