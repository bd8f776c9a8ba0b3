"""Rows to their experts and back: permute.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape
from kernels.bench.oracle import off
from kernels.bench.shapes import EXPERTS_PER_TOKEN, HIDDEN, ROUTED_EXPERTS, TOKENS
from kernels.fused import permute
from kernels.fused.permute import Plan
from kernels.metrics import MAX_ROUNDING_BF16, relative_error

CHECKED = ((1, 64, 1), (7, 129, 8), (129, 200, 3), (33, 1100, 8))  # tokens, hidden, slots
TIMED = [Shape("", (m, HIDDEN, EXPERTS_PER_TOKEN)) for m in TOKENS]
MAX_ERROR_FP32 = 1e-5


def moved(tokens: int, hidden: int, slots: int, width: int, weighted: bool) -> int:
    """Bytes of all tokens and all rows, of the plan's positions, and of the weights: gather and combine."""
    return (tokens + tokens * slots) * hidden * width + tokens * slots * (8 + 4 * weighted)


def moved_gradient(tokens: int, hidden: int, slots: int) -> int:
    """Bytes of the rows, of their tokens' gradients in BF16, of positions and of the result."""
    return 2 * (tokens + tokens * slots) * hidden + tokens * slots * (8 + 4)


def routed(draw: Draw, tokens: int, slots: int) -> Plan:
    return permute.plan_rows(draw.integers(ROUTED_EXPERTS, tokens, slots), ROUTED_EXPERTS)


def make(
    draw: Draw, tokens: int, hidden: int, slots: int, dtype: torch.dtype, weighted: bool, copies: bool
) -> Inputs:
    """Tokens, or with `copies` one row for each pair of token and slot; the plan; and the weights."""
    values = draw.values(tokens * slots if copies else tokens, hidden, dtype=dtype)
    return values, routed(draw, tokens, slots), draw.uniform(tokens, slots) if weighted else None


def make_gradient(draw: Draw, tokens: int, hidden: int, slots: int, dtype: torch.dtype) -> Inputs:
    rows, grad = (draw.values(count, hidden, dtype=dtype) for count in (tokens * slots, tokens))
    return rows, grad, routed(draw, tokens, slots)


def make_permute(draw: Draw, tokens: int, hidden: int, slots: int) -> Inputs:
    return draw.values(tokens, hidden), draw.integers(ROUTED_EXPERTS, tokens, slots)


def error_permute(inputs: Inputs, found: tuple[torch.Tensor, Plan]) -> float:
    """Rows and offsets unlike those of Python's own sort, which is stable."""
    x, experts = inputs
    rows, plan = found
    flat, slots = experts.flatten().tolist(), experts.shape[1]
    pairs = sorted(range(len(flat)), key=flat.__getitem__)
    expected = torch.stack([x[pair // slots] for pair in pairs])
    offsets = [sum(e < bound for e in flat) for bound in range(ROUTED_EXPERTS + 1)]
    wrong_offsets = sum(a != b for a, b in zip(plan.offsets.tolist(), offsets, strict=True))
    return int((rows != expected).sum()) + wrong_offsets


def error_gather(inputs: Inputs, found: torch.Tensor) -> float:
    """Elements that are not the token's, or not the product with its weight rounded once."""
    x, plan, weights = inputs
    slots = plan.place.shape[1]
    rows = x.double().repeat_interleave(slots, dim=0)
    if weights is not None:
        rows = (rows * weights.double().flatten()[:, None]).float().to(x.dtype).double()
    return off(found, rows[plan.pair], 0.0)


def error_combine(inputs: Inputs, found: torch.Tensor) -> float:
    y, plan, weights = inputs
    parts = y.double()[plan.place.flatten()].view(*plan.place.shape, -1)
    if weights is not None:
        parts = parts * weights.double()[:, :, None]
    return relative_error(found, parts.sum(dim=1))


def error_gradient(inputs: Inputs, found: torch.Tensor) -> float:
    y, grad, plan = inputs
    parts = y.double()[plan.place.flatten()].view(*plan.place.shape, -1)
    return relative_error(found, torch.einsum("tsh,th->ts", parts, grad.double()))


def eager_gather(x: torch.Tensor, plan: Plan, weights: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    tokens = plan.pair // plan.place.shape[1]
    return lambda: x.index_select(0, tokens)


def eager_combine(y: torch.Tensor, plan: Plan, weights: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    place, shape = plan.place.flatten(), plan.place.shape
    factors = None if weights is None else weights.to(y.dtype)[:, None, :]

    def call() -> torch.Tensor:
        rows = y.index_select(0, place).view(*shape, -1)
        return rows.sum(dim=1) if factors is None else torch.bmm(factors, rows)[:, 0]

    return call


def eager_gradient(y: torch.Tensor, grad: torch.Tensor, plan: Plan) -> Callable[[], torch.Tensor]:
    place, shape = plan.place.flatten(), plan.place.shape
    return lambda: torch.bmm(y.index_select(0, place).view(*shape, -1), grad[:, :, None])[:, :, 0]


def gather_entry(operands: str, dtype: torch.dtype, weighted: bool, timed: Sequence[Shape] = ()) -> Entry:
    return Entry(
        "gather",
        operands,
        partial(make, dtype=dtype, weighted=weighted, copies=False),
        lambda *inputs: permute.gather(*inputs),
        error_gather,
        "elements that are wrong",
        0,
        CHECKED,
        moved=partial(moved, width=dtype.itemsize, weighted=weighted),
        timed=timed,
        small=(512, 512, 4) if timed else None,
        peers=[Peer("torch.index_select", eager_gather, "any")],
    )


def combine_entry(operands: str, dtype: torch.dtype, weighted: bool, timed: Sequence[Shape] = ()) -> Entry:
    return Entry(
        "combine",
        operands,
        partial(make, dtype=dtype, weighted=weighted, copies=True),
        lambda *inputs: permute.combine(*inputs),
        error_combine,
        f"relative error, {'FP32' if dtype == torch.float32 else 'BF16'}",
        MAX_ERROR_FP32 if dtype == torch.float32 else MAX_ROUNDING_BF16,
        CHECKED,
        moved=partial(moved, width=dtype.itemsize, weighted=weighted),
        timed=timed,
        small=(512, 512, 4) if timed else None,
        peers=[Peer("index_select and bmm", eager_combine, "any")],
    )


ENTRIES = [
    Entry(
        "permute",
        "",
        make_permute,
        lambda x, experts: permute.permute(x, experts, ROUTED_EXPERTS),
        error_permute,
        "elements and offsets that are wrong",
        0,
        CHECKED,
        moved=partial(moved, width=4, weighted=False),
    ),
    gather_entry("BF16", torch.bfloat16, False, TIMED),
    gather_entry("BF16 weighted", torch.bfloat16, True),
    gather_entry("FP32 weighted", torch.float32, True),
    combine_entry("BF16 weighted", torch.bfloat16, True, TIMED),
    combine_entry("FP32", torch.float32, False),
    Entry(
        "weight_gradient",
        "BF16",
        partial(make_gradient, dtype=torch.bfloat16),
        lambda *inputs: permute.weight_gradient(*inputs),
        error_gradient,
        "relative error, FP32",
        MAX_ERROR_FP32,
        CHECKED,
        moved=moved_gradient,
        exact=(),
        timed=TIMED,
        small=(512, 512, 4),
        peers=[Peer("index_select and bmm", eager_gradient, "any")],
    ),
]
