"""Attention in training: mla_attention.py, beside torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.attention import mla_attention
from kernels.attention.mla_tiles import document_starts
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape, Sizes
from kernels.bench.shapes import HEADS, LENGTH, QK_WIDTH, ROTARY, V_WIDTH
from kernels.metrics import relative_error

# Batch, positions, heads, and the widths of content, of the rotary part and of a value.
CHECKED = ((1, 2, 1, 16, 8, 16), (2, 7, 3, 16, 16, 32), (1, 129, 2, 10, 8, 14), (1, 300, 1, 128, 64, 128))
WIDTHS = (QK_WIDTH - ROTARY, ROTARY, V_WIDTH)
TIMED = [Shape("", (batch, length, HEADS, *WIDTHS)) for batch, length in ((1, LENGTH), (1, 2 * LENGTH))]
SMALL = (1, 256, 4, *WIDTHS)
# In BF16 the probabilities are rounded before they are multiplied, and so is the output. Going back it is the
# difference of two such that counts, which may nearly cancel.
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
MAX_ERROR_BACK = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

Results = tuple[torch.Tensor, ...]
Attention = Callable[..., torch.Tensor]


def pairs(batch: int, length: int, heads: int) -> int:
    """Queries with the keys that they see, of all heads, where a row is one document."""
    return batch * heads * length * (length + 1) // 2


def flops(batch: int, length: int, heads: int, content: int, rotary: int, value: int) -> int:
    """Scores and weighted sum, of the causal half."""
    return pairs(batch, length, heads) * 2 * (content + rotary + value)


def flops_both(batch: int, length: int, heads: int, content: int, rotary: int, value: int) -> int:
    """With the backward pass: the scores once more, the gradients of v and p, of q and of k."""
    back = 3 * (content + rotary) + 2 * value
    return flops(batch, length, heads, content, rotary, value) + pairs(batch, length, heads) * 2 * back


def moved(batch: int, length: int, heads: int, content: int, rotary: int, value: int, width: int) -> int:
    """Bytes of queries, of content keys and values, of the shared rotary key, and of the output."""
    head = content + rotary + content + value + value
    return batch * length * width * (heads * head + rotary)


def moved_both(batch: int, length: int, heads: int, content: int, rotary: int, value: int, width: int) -> int:
    """With the gradients of all that: twice the bytes."""
    return 2 * moved(batch, length, heads, content, rotary, value, width)


def make(
    draw: Draw, batch: int, length: int, heads: int, content: int, rotary: int, value: int, dtype: torch.dtype
) -> Inputs:
    """q, key_value, key_rotary, scale, starts and the output's gradient. What is checked has documents."""
    # Large outliers would give one key all of the probability, and gradients that are rounding's remains.
    values = partial(draw.values, dtype=dtype, outliers=2.0)
    starts = None
    if draw.rough:
        starts = document_starts(draw.integers(4, batch, length).sort(dim=1).values)
    return (
        values(batch, length, heads, content + rotary),
        values(batch, length, heads, content + value),
        values(batch, length, rotary),
        (content + rotary) ** -0.5,
        starts,
        values(batch, length, heads, value),
    )


def forward(attention: Attention, *inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return attention(*inputs[:-1])


def forward_and_back(attention: Attention, *inputs: object) -> Results:
    """The gradients of q, key_value and key_rotary."""
    *parts, scale, starts, grad = inputs
    leaves = [part.detach().requires_grad_() for part in parts]
    return torch.autograd.grad(attention(*leaves, scale, starts), leaves, grad)


def whole(
    q: torch.Tensor, key_value: torch.Tensor, key_rotary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [B, H, T, width], the rotary key copied to all heads."""
    heads, content = q.shape[2], q.shape[3] - key_rotary.shape[2]
    rotary = key_rotary[:, :, None].expand(-1, -1, heads, -1)
    k = torch.cat([key_value[..., :content], rotary], dim=-1)
    return q.transpose(1, 2), k.transpose(1, 2), key_value[..., content:].transpose(1, 2)


def plain(
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by its formula."""
    queries, keys, values = whole(q, key_value, key_rotary)
    position = torch.arange(q.shape[1], device=q.device)
    first = torch.zeros_like(position)[None] if starts is None else starts
    seen = (position <= position[:, None]) & (position >= first[..., None])
    scores = (queries @ keys.mT * scale).masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(dim=-1) @ values).transpose(1, 2)


def error(inputs: Inputs, found: torch.Tensor | Results, run: Callable[..., Results | torch.Tensor]) -> float:
    """The worst relative error of what is found, the output or the gradients."""
    exact = run(
        plain, *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
    )
    both = ((found,), (exact,)) if isinstance(found, torch.Tensor) else (found, exact)
    return max(relative_error(*pair) for pair in zip(*both, strict=True))


def sdpa(
    *inputs: object, back: bool, backend: SDPBackend | None = None, padded: bool = False
) -> Callable[[], Results]:
    """torch's attention over whole keys, which are made untimed; `padded`: values as wide as keys."""
    q, key_value, key_rotary, scale, _, grad = inputs
    parts = [part.contiguous() for part in whole(q, key_value, key_rotary)]
    width, grad = grad.shape[-1], grad.transpose(1, 2)
    if padded:
        parts[2] = pad(parts[2], (0, q.shape[-1] - width))
        grad = pad(grad, (0, q.shape[-1] - width))
    leaves = [part.detach().requires_grad_(back) for part in parts]

    def run() -> Results:
        out = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)
        if not back:
            return (out[..., :width].transpose(1, 2),)
        first, *others = torch.autograd.grad(out, leaves, grad)
        return first.transpose(1, 2), *others

    def call() -> Results:
        if backend is None:
            return run()
        with sdpa_kernel(backend):
            return run()

    return call


def entry(
    operands: str,
    dtype: torch.dtype,
    back: bool,
    timed: Sequence[Shape] = (),
    small: Sizes | None = None,
    goal: float | None = None,
) -> Entry:
    kind = "FP32" if dtype == torch.float32 else "BF16"
    run = forward_and_back if back else forward
    return Entry(
        "mla_attention",
        operands,
        partial(make, dtype=dtype),
        lambda *inputs: run(mla_attention.mla_attention, *inputs),
        partial(error, run=run),
        f"relative error of the {'gradients' if back else 'output'}, {kind}",
        (MAX_ERROR_BACK if back else MAX_ERROR)[dtype],
        CHECKED[1:] if back else CHECKED,  # with two keys there is nothing but cancellation
        moved=partial(moved_both if back else moved, width=dtype.itemsize),
        flops=flops_both if back else flops,
        exact=(),
        timed=timed,
        small=small,
        unit="TFLOPS",
        peers=[
            Peer("SDPA cuDNN", partial(sdpa, back=back, backend=SDPBackend.CUDNN_ATTENTION)),
            Peer("SDPA flash", partial(sdpa, back=back, backend=SDPBackend.FLASH_ATTENTION, padded=True)),
            Peer("SDPA", partial(sdpa, back=back), "cpu"),
        ],
        goal=goal,
        kernel="gradients_triton" if back else "attention_triton",
    )


ENTRIES = [
    entry("BF16", torch.bfloat16, False, TIMED, goal=500),
    entry("FP32", torch.float32, False, small=SMALL),
    entry("BF16, forward and backward", torch.bfloat16, True, TIMED),
    entry("FP32, forward and backward", torch.float32, True, small=SMALL),
]
