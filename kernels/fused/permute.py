"""Tokens to their experts and back: permute, and unpermute with the weighted sum over a token's experts.

    permute      rows[r] = x[token of r]                      rows sorted by expert, stable
    unpermute    out[t] = sum over slots k of weights[t, k] * y[place[t, k]]

A token has K experts, one a slot; pair t * K + k is slot k of token t. Rows are pairs sorted by expert, and
by pair within one. Their number is tokens * K whatever the routing, so no step waits for the device: an
expert's rows are found by `Plan.offsets`, which stays there. Rows in FP8 move with the scales of their tiles.

Sums run in FP32 over the slots in order, starting from zero, and each of their operations rounds on its own.
No result depends on the order in which threads run, and the rows of the kernels are those of the reference
bit for bit; only the gradient of a weight (a sum over the hidden dimension) may differ in rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

from kernels.backend import jit, runs_triton, tl
from kernels.formats.quantize import TILES, Quantized

Rows = TypeVar("Rows", torch.Tensor, Quantized)

MAX_SLOTS = 8  # experts of one token; the kernels unroll over them
BLOCK = 1024  # columns that one program takes at a time
BYTE_BLOCK = 2048  # the same for rows of bytes: a thread still loads 16 of them at once
# Without fusion a product rounds before it is added, as in the reference.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Plan:
    """Where the rows of T tokens with K experts each lie, for E experts. All are int64 and contiguous.

    pair     [T * K]    the pair (token * K + slot) of each row
    place    [T, K]     the row of each pair: the inverse of `pair`
    offsets  [E + 1]    rows of expert e are offsets[e] to offsets[e + 1]
    """

    pair: torch.Tensor
    place: torch.Tensor
    offsets: torch.Tensor


def plan_rows(experts: torch.Tensor, count: int) -> Plan:
    """The plan for `experts` [tokens, K] (int64 or int32, 0 to count - 1), K from 1 to 8. Runs in PyTorch.

    On a GPU the numbers are not checked, since that would wait for the device: rows of an expert that does
    not exist lie after offsets[count], where rows belong to no expert (`kernels.formats.grouped_quantize`).

    Raises:
        ValueError, TypeError: the shape, the type, `count` or, on a CPU, an expert's number is wrong.
    """
    if experts.dim() != 2 or not 1 <= experts.shape[1] <= MAX_SLOTS:
        raise ValueError(
            f"permute: experts have shape {tuple(experts.shape)}; "
            f"pass [tokens, K] with K from 1 to {MAX_SLOTS}"
        )
    if experts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"permute: experts are {experts.dtype}; pass torch.int64 or torch.int32")
    if count < 1:
        raise ValueError(f"permute: count is {count}; there must be at least one expert")
    if experts.device.type == "cpu" and experts.numel() > 0:
        low, high = (int(end) for end in experts.aminmax())
        if low < 0 or high >= count:
            raise ValueError(
                f"permute: experts reach from {low} to {high}; they must lie in 0 to {count - 1}"
            )
    numbers = experts.reshape(-1).long()
    # A negative number would otherwise sort before expert 0, among rows that no grouped GEMM writes.
    in_order, pair = numbers.masked_fill(numbers < 0, count).sort(stable=True)
    place = torch.empty_like(pair)
    place[pair] = torch.arange(len(pair), device=pair.device)
    offsets = torch.searchsorted(in_order, torch.arange(count + 1, device=pair.device))
    return Plan(pair, place.view(experts.shape), offsets)


def permute(x: Rows, experts: torch.Tensor, count: int) -> tuple[Rows, Plan]:
    """Rows [tokens * K, hidden] of `x` [tokens, hidden] sorted by expert, and their plan.

    `x` is FP32 or BF16, or 1x128 tiles in FP8, whose codes and scales are moved as they are. `experts`
    [tokens, K] holds the experts of each token, `count` how many there are. Some may have no rows, and
    there may be no tokens. The gradient of a token is the FP32 sum over its rows, slot by slot; FP8 has none.

    Raises:
        ValueError, TypeError: shapes, types, devices or an expert's number (see `plan_rows`) do not fit.
        RuntimeError: the tensors are on a GPU that the kernels do not support.
    """
    in_fp8 = isinstance(x, Quantized)
    if in_fp8 and x.block != TILES:
        raise ValueError(f"permute: x is quantised in blocks of {x.block}; use quantize_tiles")
    if not in_fp8:
        _check_matrix("permute: x", x)
    plan = plan_rows(experts, count)
    if x.shape[0] != experts.shape[0]:
        raise ValueError(f"permute: x has {x.shape[0]} tokens and experts {experts.shape[0]}")
    _check_device("permute: x", x.codes if in_fp8 else x, plan)
    if not in_fp8:
        return _Permute.apply(x, plan), plan
    codes = gather(x.codes.view(torch.uint8), plan).view(x.codes.dtype)
    return Quantized(codes, gather(x.scales, plan), TILES), plan


def unpermute(y: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """[tokens, hidden] in the type of `y`: for each token the sum over slots of weight times row.

    y is [tokens * K, hidden] (FP32 or BF16) in the order of `plan`, `weights` [tokens, K] (FP32 or BF16);
    without them every weight is 1. Each gradient has the type of its tensor.

    Raises:
        ValueError, TypeError: shapes, types or devices do not fit.
        RuntimeError: the tensors are on a GPU that the kernels do not support.
    """
    _check_matrix("unpermute: y", y)
    if y.shape[0] != len(plan.pair) or (weights is not None and weights.shape != plan.place.shape):
        given = "" if weights is None else f" and weights have shape {tuple(weights.shape)}"
        raise ValueError(
            f"unpermute: y has {y.shape[0]} rows{given}; "
            f"the plan needs {len(plan.pair)} and {tuple(plan.place.shape)}"
        )
    _check_device("unpermute: y", y, plan)
    if weights is not None:
        _check_matrix("unpermute: weights", weights)
        _check_device("unpermute: weights", weights, plan)
    return _Unpermute.apply(y, weights, plan)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        return gather(x, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return combine(grad, ctx.plan), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weights: torch.Tensor | None, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights)
        return combine(y, plan, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        y, weights = ctx.saved_tensors
        dy = gather(grad, ctx.plan, weights) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(y, grad, ctx.plan).to(weights.dtype) if ctx.needs_input_grad[1] else None
        return dy, dw, None


def gather(x: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Rows [tokens * K, hidden] in the type of `x`: each row its token, times its weight if there are any."""
    return (gather_triton if runs_triton(x) else gather_reference)(x, plan, weights)


def combine(y: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """[tokens, hidden] in the type of `y`: the FP32 sum of each token's rows, times weights if given."""
    return (combine_triton if runs_triton(y) else combine_reference)(y, plan, weights)


def weight_gradient(y: torch.Tensor, grad: torch.Tensor, plan: Plan) -> torch.Tensor:
    """FP32 [tokens, K]: the product of each pair's row of `y` with its token's row of `grad`."""
    return (weight_gradient_triton if runs_triton(y) else weight_gradient_reference)(y, grad, plan)


def gather_reference(x: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The PyTorch reference of `gather`, on any device."""
    # Not by an index: on a CPU that copies bytes one at a time.
    rows = x.index_select(0, plan.pair // plan.place.shape[1])
    if weights is None:
        return rows
    return (weights.reshape(-1)[plan.pair].float()[:, None] * rows.float()).to(x.dtype)


def combine_reference(y: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The PyTorch reference of `combine`, on any device."""
    tokens, slots = plan.place.shape
    total = torch.zeros((tokens, y.shape[1]), dtype=torch.float32, device=y.device)
    for slot in range(slots):
        row = y.index_select(0, plan.place[:, slot]).float()
        total += row if weights is None else weights[:, slot, None].float() * row
    return total.to(y.dtype)


def weight_gradient_reference(y: torch.Tensor, grad: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The PyTorch reference of `weight_gradient`, on any device."""
    slots = plan.place.shape[1]
    parts = [(y[plan.place[:, slot]].float() * grad.float()).sum(dim=1) for slot in range(slots)]
    return torch.stack(parts, dim=1)


def gather_triton(x: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The Triton kernel of `gather`."""
    (tokens, slots), hidden = plan.place.shape, x.shape[1]
    out = torch.empty((tokens * slots, hidden), dtype=x.dtype, device=x.device)
    block = BYTE_BLOCK if x.element_size() == 1 else BLOCK
    if out.numel() > 0:
        with torch.cuda.device_of(x):
            gather_kernel[(tokens, -(-hidden // block))](
                x.contiguous(), plan.place, _or_unused(weights, plan), out, hidden,
                K=slots, WEIGHTED=weights is not None, BLOCK=block, **OPTIONS,
            )  # fmt: skip
    return out


def combine_triton(y: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The Triton kernel of `combine`."""
    (tokens, slots), hidden = plan.place.shape, y.shape[1]
    out = torch.empty((tokens, hidden), dtype=y.dtype, device=y.device)
    if out.numel() > 0:
        with torch.cuda.device_of(y):
            combine_kernel[(tokens, -(-hidden // BLOCK))](
                y.contiguous(), plan.place, _or_unused(weights, plan), out, hidden,
                K=slots, WEIGHTED=weights is not None, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return out


def weight_gradient_triton(y: torch.Tensor, grad: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The Triton kernel of `weight_gradient`."""
    tokens, slots = plan.place.shape
    out = torch.empty((tokens, slots), dtype=torch.float32, device=y.device)
    if out.numel() > 0:
        with torch.cuda.device_of(y):
            weight_gradient_kernel[(tokens * slots,)](
                y.contiguous(), grad.contiguous(), plan.place, out, y.shape[1],
                K=slots, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return out


def _or_unused(weights: torch.Tensor | None, plan: Plan) -> torch.Tensor:
    """A tensor to pass for weights: a kernel without weights reads none."""
    return plan.place if weights is None else weights.contiguous()


def _check_matrix(what: str, x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{what} has shape {tuple(x.shape)}; pass a matrix")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{what} is {x.dtype}; pass torch.float32 or torch.bfloat16")


def _check_device(what: str, x: torch.Tensor, plan: Plan) -> None:
    if x.device != plan.pair.device:
        raise ValueError(f"{what} is on {x.device} and the plan on {plan.pair.device}; move one of them")


@jit
def gather_kernel(
    x, place, weights, out, hidden,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one token, read once and written to each of its rows."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + token * hidden + col, mask=col < hidden)
    for slot in tl.static_range(K):
        row = tl.load(place + token * K + slot)
        if WEIGHTED:
            weighted = tl.load(weights + token * K + slot).to(tl.float32) * values.to(tl.float32)
            tl.store(out + row * hidden + col, weighted.to(out.dtype.element_ty), mask=col < hidden)
        else:
            tl.store(out + row * hidden + col, values, mask=col < hidden)


@jit
def combine_kernel(
    y, place, weights, out, hidden,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(place + token * K + slot)
        values = tl.load(y + row * hidden + col, mask=col < hidden, other=0.0).to(tl.float32)
        if WEIGHTED:
            values = tl.load(weights + token * K + slot).to(tl.float32) * values
        total += values
    tl.store(out + token * hidden + col, total.to(out.dtype.element_ty), mask=col < hidden)


@jit
def weight_gradient_kernel(y, grad, place, out, hidden, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one pair."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(place + pair)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        col = start + tl.arange(0, BLOCK)
        values = tl.load(y + row * hidden + col, mask=col < hidden, other=0.0).to(tl.float32)
        grads = tl.load(grad + pair // K * hidden + col, mask=col < hidden, other=0.0).to(tl.float32)
        total += values * grads
    tl.store(out + pair, tl.sum(total, axis=0))
