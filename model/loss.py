"""Training losses: cross-entropy that never holds all logits, next-token and multi-token parts, balance.

Legend: B batch, T positions, D hidden, O vocabulary, S scored positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.transformer import Output, Transformer

CHUNK = 512
"""Positions whose logits exist at one time. Few enough that a CPU's allocator hands out the same memory for
every chunk: blocks above 32 MiB come from the system and go back to it, page by page, each time."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target); the gradient is made in the forward pass, chunk by chunk, while logits exist."""

    @staticmethod
    def forward(ctx: Any, states_SD: Tensor, head_OD: Tensor, targets_S: Tensor, need: bool) -> Tensor:
        total = states_SD.new_zeros((), dtype=torch.float32)
        grad_states = torch.empty_like(states_SD) if need else None
        grad_head = torch.zeros_like(head_OD, dtype=torch.float32) if need else None
        head = head_OD.to(states_SD.dtype)
        for start in range(0, states_SD.shape[0], CHUNK):
            states, targets = states_SD[start : start + CHUNK], targets_S[start : start + CHUNK]
            log_probs = torch.log_softmax((states @ head.t()).float(), dim=-1)
            total -= log_probs.gather(1, targets[:, None]).sum()
            if need:
                grad = log_probs.exp_()
                grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
                grad = grad.to(states.dtype)
                torch.mm(grad, head, out=grad_states[start : start + CHUNK])
                if grad.dtype == torch.float32:
                    grad_head.addmm_(grad.t(), states)
                else:
                    grad_head += grad.t() @ states
        ctx.save_for_backward(*((grad_states, grad_head) if need else ()))
        ctx.head_dtype = head_OD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * grad.to(grad_states.dtype), (grad_head * grad).to(ctx.head_dtype), None, None


def cross_entropy_sum(states_SD: Tensor, head_OD: Tensor, targets_S: Tensor) -> Tensor:
    """Sum over positions of the cross-entropy of states @ head.T against targets, in nats (float32
    scalar)."""
    # Inside a Function gradients look wanted even under no_grad, so whether they are is decided out here.
    need = torch.is_grad_enabled() and (states_SD.requires_grad or head_OD.requires_grad)
    return _LinearCrossEntropy.apply(states_SD, head_OD, targets_S, need)


@dataclass
class Losses:
    """Sums over one micro-batch, to be divided by the step's counted targets."""

    main: Tensor
    mtp: list[Tensor]
    balance: Tensor  # sum over expert layers of sum_i f_i P_i, averaged over sequences


def next_token_losses(
    model: Transformer,
    output: Output,
    tokens_BT: Tensor,
    counted_BT: Tensor,
    segments_BT: Tensor | None = None,
) -> Losses:
    """Losses of every depth. `counted_BT` (bool) marks tokens that count when they are predicted.

    Depth k predicts token i+k+1 from position i. All depths share the main divisor: the report divides by
    T, not by the T-k terms there are (equation 24). With `segments_BT`, nothing is predicted across the
    boundary of two samples.
    """
    sums = []
    for depth, states in enumerate(output.states_BTD):
        shift = depth + 1
        keep = counted_BT[:, shift:]
        if segments_BT is not None:
            keep = keep & (segments_BT[:, shift:] == segments_BT[:, :-shift])
        picked = states[:, : tokens_BT.shape[1] - shift][keep]
        sums.append(cross_entropy_sum(picked, model.lm_head, tokens_BT[:, shift:][keep]))
    routings = output.routings
    balance = torch.stack([r.balance_loss for r in routings]).sum() if routings else sums[0].new_zeros(())
    return Losses(sums[0], sums[1:], balance)
