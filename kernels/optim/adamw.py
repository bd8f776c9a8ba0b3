"""An AdamW step over a whole list of parameters, moments in BF16 (DeepSeek-V3 report, section 3.3.2).

Master weights are FP32, gradients FP32 or BF16; both moments are kept in BF16 and widened for the arithmetic:

    g      = gradient * grad_scale                       the scale, if given, of global-norm clipping
    mean   = mean * beta1 + g * (1 - beta1)
    square = square * beta2 + (g * g) * (1 - beta2)
    master = master * (1 - lr * weight_decay) - (mean * size) / (sqrt(square) + small)

Mean and square enter the last line as they are before they are rounded to BF16 and put away. With c =
sqrt(1 - beta2**step), size = lr * c / (1 - beta1**step) and small = eps * c: the usual bias corrections,
multiplied out on the host, so that no element pays for them.

Every step is one correctly rounded FP32 operation, nothing is fused, and the moments are rounded to nearest
even, so the reference and the kernel agree bit for bit. NaN and infinity in a gradient turn their parameter
to NaN. So does a square too large for BF16: dividing by infinity would stop the parameter, unnoticed.

One launch goes over all tensors, however many and small (`tensor_table.py`), and touches each byte once: 12
read and 8 written a parameter with FP32 gradients, 2 more written for a BF16 copy of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.exact import square_root_
from kernels.optim.tensor_table import TensorTable, start

CHUNK = 1024  # elements that a program updates
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

SQUARE_LIMIT = 2.0**128 - 2.0**119  # from here on BF16 rounds to infinity
# Elements that the reference updates at a time for each thread of the CPU, so that what lies between two
# operations stays in the cache; tensors up to the second size are joined, to share the cost of an operator.
BAND, JOINED = 262144, 32768

Tensors = Sequence[torch.Tensor]


class Factors(NamedTuple):
    """The numbers of a step that are the same for all parameters, as the module's text names them."""

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    small: float
    size: float
    decay: float


def adamw_step(
    masters: Tensors,
    grads: Tensors,
    means: Tensors,
    squares: Tensors,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    copies: Tensors | None = None,
    grad_scale: torch.Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    """One AdamW step of all `masters`, in place; `step` counts from 1.

    The i-th tensors of all lists have the same shape, any, also an empty one, and are contiguous: `masters`
    FP32, `grads` all FP32 or all BF16, `means` and `squares` (zeros before the first step) BF16. `copies`, if
    given, are BF16 tensors that receive the new weights. `grad_scale`, if given, is one FP32 number on the
    device, which the host does not read. A `table` kept from call to call, one for each list, saves work on a
    GPU. Parameters with another weight decay, or another count of steps, take a call of their own.

    Raises:
        TypeError, ValueError: numbers, types, shapes, layouts or devices do not fit.
        RuntimeError: the tensors are on a GPU and Triton cannot run there.
    """
    factors = _factors(lr, betas, eps, weight_decay, step)
    named = {"masters": masters, "grads": grads, "means": means, "squares": squares}
    if copies is not None:
        named["copies"] = copies
    columns = list(named.values())
    table = table or TensorTable()
    known = table.known(columns)
    _check(named, known, grad_scale)
    if not masters:
        return
    with torch.no_grad():
        if runs_triton(masters[0], e4m3=False):
            adamw_step_triton(columns, factors, grad_scale, table, known)
        else:
            adamw_step_reference(columns, factors, grad_scale)


def adamw_step_reference(
    columns: Sequence[Tensors], factors: Factors, grad_scale: torch.Tensor | None
) -> None:
    """The PyTorch reference, on a CPU: the kernel must agree with it bit for bit."""
    work = columns[0][0].new_empty(3, max(BAND, 2 * JOINED))
    peaks = [work.new_zeros(())]
    for batch in _batches(columns):
        if len(batch) == 1:
            pieces = batch[0]
        else:
            pieces = [torch.cat(column) for column in zip(*batch, strict=True)]
        peaks.append(_step_flat(pieces, factors, grad_scale, work[:, : pieces[0].numel()]))
        if len(batch) > 1:
            sizes = [tensors[0].numel() for tensors in batch]
            for index in (0, *range(2, len(columns))):
                for tensors, part in zip(batch, pieces[index].split(sizes), strict=True):
                    tensors[index].copy_(part)
    if not float(torch.stack(peaks).amax()) < SQUARE_LIMIT:
        for master, _, _, square, *copy in zip(*columns, strict=True):
            for weights in (master, *copy):
                weights.masked_fill_(square == torch.inf, torch.nan)


def adamw_step_triton(
    columns: Sequence[Tensors],
    factors: Factors,
    grad_scale: torch.Tensor | None,
    table: TensorTable,
    known: Sequence[bool] | None = None,
) -> None:
    """The Triton kernel: what `adamw_step` runs on a GPU. `known` is what the table knows of `columns`."""
    table.update(CHUNK, columns, known)
    if table.chunks > 0:
        with torch.cuda.device_of(columns[0][0]):
            step_kernel[(table.chunks,)](
                table.rows, table.owners, grad_scale, *factors,
                BF16_GRAD=columns[1][0].dtype == torch.bfloat16, COPY=len(columns) == 5, CHUNK=CHUNK,
                **OPTIONS,
            )  # fmt: skip
    # Autograd then refuses a backward pass that has saved the old weights, as after any operator of torch.
    for column in (columns[0], *columns[2:]):
        torch.autograd.graph.increment_version(column)


def _factors(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> Factors:
    for name, value, fits, rule in (
        ("lr", lr, lr >= 0, "not negative"),
        ("betas[0]", betas[0], 0 <= betas[0] < 1, "at least 0 and below 1"),
        ("betas[1]", betas[1], 0 <= betas[1] < 1, "at least 0 and below 1"),
        ("eps", eps, eps > 0, "positive"),
        ("weight_decay", weight_decay, weight_decay >= 0, "not negative"),
        ("step", step, step >= 1, "at least 1"),
    ):
        if not (fits and math.isfinite(value)):
            raise ValueError(f"adamw_step: {name} is {value}; it must be finite and {rule}")
    beta1, beta2 = betas
    correction = math.sqrt(1 - beta2**step)
    return Factors(
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        small=eps * correction,
        size=lr * correction / (1 - beta1**step),
        decay=1 - lr * weight_decay,
    )


def _batches(columns: Sequence[Tensors]) -> Iterator[list[list[torch.Tensor]]]:
    """The tensors as lists of flat pieces: a band of a large one alone, or several small ones."""
    small: list[list[torch.Tensor]] = []
    size = 0
    for tensors in zip(*columns, strict=True):
        flat = [tensor.view(-1) for tensor in tensors]
        elements = flat[0].numel()
        if elements > JOINED:
            for pieces in zip(*(tensor.split(BAND) for tensor in flat), strict=True):
                yield [list(pieces)]
        elif elements > 0:
            small.append(flat)
            size += elements
            if size > JOINED:
                yield small
                small, size = [], 0
    if small:
        yield small


def _step_flat(
    pieces: Tensors, factors: Factors, grad_scale: torch.Tensor | None, work: torch.Tensor
) -> torch.Tensor:
    """One step of flat tensors, by way of `work` [3, elements]; returns the largest square."""
    master, grad, mean_bf16, square_bf16, *copy = pieces
    mean, square, product = work.unbind()
    one = work.new_ones(())
    grad = grad.float()
    if grad_scale is not None:
        grad = grad * grad_scale
    # torch may fuse the product and the sum of lerp_, addcmul_ or add_ with alpha. In addcdiv_ it cannot: the
    # division, here by one, stands between them.
    mean.copy_(mean_bf16)
    mean.mul_(factors.beta1).addcdiv_(grad, one, value=factors.rest1)
    mean_bf16.copy_(mean)
    square.copy_(square_bf16)
    torch.mul(grad, grad, out=product)
    square.mul_(factors.beta2).addcdiv_(product, one, value=factors.rest2)
    square_bf16.copy_(square)
    peak = square.amax()
    square_root_(square).add_(factors.small)
    master.mul_(factors.decay).addcdiv_(mean, square, value=-factors.size)
    for weights in copy:
        weights.copy_(master)
    return peak


def _check(columns: dict[str, Tensors], known: Sequence[bool], grad_scale: torch.Tensor | None) -> None:
    """Raise TypeError or ValueError when something does not fit. Columns known to a table have been checked,
    beside masters that must be known too."""
    masters, grads = columns["masters"], columns["grads"]
    for name, column in columns.items():
        if len(column) != len(masters):
            raise ValueError(
                f"adamw_step: there are {len(column)} {name} and {len(masters)} masters; pass one for each"
            )
    if not masters:
        return
    device = masters[0].device
    bf16_grads = grads[0].dtype == torch.bfloat16
    for (name, column), checked in zip(columns.items(), known, strict=True):
        if checked and known[0]:
            continue
        dtype = torch.float32 if name == "masters" or (name == "grads" and not bf16_grads) else torch.bfloat16
        for index, (tensor, master) in enumerate(zip(column, masters, strict=True)):
            if tensor.dtype != dtype:
                rule = "gradients are all FP32 or all BF16" if name == "grads" else f"it must be {dtype}"
                raise TypeError(f"adamw_step: {name}[{index}] is {tensor.dtype}; {rule}")
            if tensor.device != device:
                raise ValueError(
                    f"adamw_step: {name}[{index}] is on {tensor.device} and masters[0] on {device}; "
                    "move one of them"
                )
            if tensor.shape != master.shape:
                raise ValueError(
                    f"adamw_step: {name}[{index}] has shape {tuple(tensor.shape)} and masters[{index}] "
                    f"{tuple(master.shape)}; they must be equal"
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"adamw_step: {name}[{index}] is not contiguous, its strides are {tensor.stride()}; "
                    "pass .contiguous()"
                )
    if grad_scale is not None:
        if grad_scale.dtype != torch.float32 or grad_scale.numel() != 1:
            raise ValueError(
                f"adamw_step: grad_scale is {grad_scale.dtype} {tuple(grad_scale.shape)}; "
                "pass one torch.float32 number"
            )
        if grad_scale.device != device:
            raise ValueError(
                f"adamw_step: grad_scale is on {grad_scale.device} and masters[0] on {device}; "
                "move one of them"
            )


@jit
def step_kernel(
    rows, owners, grad_scale, beta1, rest1, beta2, rest2, small, size, decay,
    BF16_GRAD: tl.constexpr, COPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one parameter. `grad_scale` may be None."""
    chunk = tl.program_id(0)
    row = rows + tl.load(owners + chunk) * (7 if COPY else 6)
    first = (chunk - tl.load(row)) * CHUNK
    left = tl.load(row + 1) - first
    master, grad = tl.load(row + 2), tl.load(row + 3)
    mean, square = tl.load(row + 4), tl.load(row + 5)
    copy = master
    if COPY:
        copy = tl.load(row + 6)
    scale = None
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    # A mask, or an address that may be odd, makes every access narrow: only ends and odd views pay for it.
    if (left >= CHUNK) & (((master | grad | mean | square | copy) & 15) == 0):
        _update(
            master, grad, mean, square, copy, scale, first, left,
            beta1, rest1, beta2, rest2, small, size, decay, BF16_GRAD, COPY, CHUNK, True,
        )  # fmt: skip
    else:
        _update(
            master, grad, mean, square, copy, scale, first, left,
            beta1, rest1, beta2, rest2, small, size, decay, BF16_GRAD, COPY, CHUNK, False,
        )  # fmt: skip


@jit
def _update(
    master, grad, mean, square, copy, scale, first, left,
    beta1, rest1, beta2, rest2, small, size, decay,
    BF16_GRAD: tl.constexpr, COPY: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    offset = tl.arange(0, CHUNK)
    inside = None
    if not WIDE:
        inside = offset < left
    master_at = start(master, tl.float32, WIDE) + first + offset
    mean_at = start(mean, tl.bfloat16, WIDE) + first + offset
    square_at = start(square, tl.bfloat16, WIDE) + first + offset
    weight = tl.load(master_at, mask=inside)
    grad_at = start(grad, tl.bfloat16 if BF16_GRAD else tl.float32, WIDE) + first + offset
    g = tl.load(grad_at, mask=inside).to(tl.float32)
    m = tl.load(mean_at, mask=inside).to(tl.float32)
    v = tl.load(square_at, mask=inside).to(tl.float32)
    if scale is not None:
        g = g * scale
    m = m * beta1 + g * rest1
    v = v * beta2 + (g * g) * rest2
    weight = weight * decay - tl.div_rn(m * size, tl.sqrt_rn(v) + small)
    weight = tl.where(v < 3.39617752923046e38, weight, float("nan"))  # SQUARE_LIMIT
    tl.store(master_at, weight, mask=inside)
    tl.store(mean_at, m.to(tl.bfloat16), mask=inside)
    tl.store(square_at, v.to(tl.bfloat16), mask=inside)
    if COPY:
        copy_at = start(copy, tl.bfloat16, WIDE) + first + offset
        tl.store(copy_at, weight.to(tl.bfloat16), mask=inside)
