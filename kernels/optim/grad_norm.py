"""The norm of all gradients, as global-norm clipping needs it (DeepSeek-V3 report, section 4.2).

    norm  = sqrt(sum of all elements' squares)
    scale = min(1, limit / (norm + 1e-6))       for `adamw_step`, which multiplies it in

Both stay on the device, so that neither the norm nor clipping makes the host wait, and no pass over the
gradients is spent on scaling them.

The sum is FP32 in a fixed order. A tensor is cut into chunks of 8192 elements, each summed as a row of
`exact.py`; the sums of all chunks, in the order of the tensors, are cut and summed in the same way until one
is left. Every step is one correctly rounded operation, so the norm does not depend on the order of threads,
and the reference and the kernel agree bit for bit. Each gradient is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.exact import kernel_lane_sum, row_sums, square_root_
from kernels.optim.tensor_table import TensorTable, start

CHUNK = 8192  # elements, or sums, that a program sums
BAND = 32 * CHUNK  # elements that the reference sums at a time, so that their squares stay in the cache
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def grad_norm(grads: Sequence[torch.Tensor], *, table: TensorTable | None = None) -> torch.Tensor:
    """The Euclidean norm of all elements of `grads`: one FP32 number, on their device.

    `grads` are contiguous, of any shapes, all FP32 or all BF16. A `table` kept from call to call, one for
    each list, saves work on a GPU. NaN and infinity give NaN or infinity; so does a norm beyond about 1e19,
    whose square is not an FP32 number.

    Raises:
        TypeError, ValueError: types, layouts or devices do not fit.
        RuntimeError: the tensors are on a GPU and Triton cannot run there.
    """
    table = table or TensorTable()
    known = table.known([grads])
    if not known[0]:
        _check(grads)
    if not grads:
        return torch.zeros(())
    with torch.no_grad():
        if runs_triton(grads[0], e4m3=False):
            return grad_norm_triton(grads, table, known)
        return grad_norm_reference(grads)


def clip_scale(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What to multiply gradients of norm `norm` by so that it does not exceed `limit`: FP32, on the device.

    NaN if `norm` is not finite: the quotient would be zero for an infinite one, and a step without gradients
    would go unnoticed.

    Raises:
        ValueError: `limit` is not positive.
    """
    if not limit > 0:
        raise ValueError(f"clip_scale: limit is {limit}; it must be positive")
    scale = (torch.full_like(norm, limit) / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), scale, torch.nan)


def grad_norm_reference(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The PyTorch reference: the kernel must agree with it bit for bit."""
    sums = [_chunk_sums(band.float().square()) for grad in grads for band in grad.view(-1).split(BAND)]
    total = torch.cat(sums)
    while total.numel() > 1:
        total = _chunk_sums(total)
    return square_root_(total.sum())


def grad_norm_triton(
    grads: Sequence[torch.Tensor], table: TensorTable, known: Sequence[bool] | None = None
) -> torch.Tensor:
    """The Triton kernels: what `grad_norm` runs on a GPU. `known` is what the table knows of `[grads]`."""
    table.update(CHUNK, [grads], known)
    total = torch.zeros(max(table.chunks, 1), dtype=torch.float32, device=grads[0].device)
    with torch.cuda.device_of(total):
        if table.chunks > 0:
            squares_kernel[(table.chunks,)](
                table.rows, table.owners, total,
                BF16=grads[0].dtype == torch.bfloat16, CHUNK=CHUNK, **OPTIONS,
            )  # fmt: skip
        while total.numel() > 1:
            sums = torch.empty(-(-total.numel() // CHUNK), dtype=torch.float32, device=total.device)
            sums_kernel[(sums.numel(),)](total, sums, total.numel(), CHUNK=CHUNK, **OPTIONS)
            total = sums
    return total.sqrt().view(())


def _chunk_sums(values: torch.Tensor) -> torch.Tensor:
    """The sum of each CHUNK of a flat tensor, the last filled up with zeros."""
    chunks = -(-values.numel() // CHUNK)
    padded = torch.nn.functional.pad(values, (0, chunks * CHUNK - values.numel()))
    return row_sums(padded.view(chunks, CHUNK))


def _check(grads: Sequence[torch.Tensor]) -> None:
    for index, grad in enumerate(grads):
        if grad.dtype not in (torch.float32, torch.bfloat16) or grad.dtype != grads[0].dtype:
            raise TypeError(f"grad_norm: grads[{index}] is {grad.dtype}; gradients are all FP32 or all BF16")
        if grad.device != grads[0].device:
            raise ValueError(
                f"grad_norm: grads[{index}] is on {grad.device} and grads[0] on {grads[0].device}; move one"
            )
        if not grad.is_contiguous():
            raise ValueError(
                f"grad_norm: grads[{index}] is not contiguous, its strides are {grad.stride()}; "
                "pass .contiguous()"
            )


@jit
def squares_kernel(rows, owners, sums, BF16: tl.constexpr, CHUNK: tl.constexpr):
    """One program: the sum of the squares of one chunk of one gradient."""
    chunk = tl.program_id(0)
    row = rows + tl.load(owners + chunk) * 3
    first = (chunk - tl.load(row)) * CHUNK
    left = tl.load(row + 1) - first
    grad = tl.load(row + 2)
    if (left >= CHUNK) & ((grad & 15) == 0):
        total = _sum(start(grad, tl.bfloat16 if BF16 else tl.float32, True) + first, left, CHUNK, True, True)
    else:
        total = _sum(
            start(grad, tl.bfloat16 if BF16 else tl.float32, False) + first, left, CHUNK, False, True
        )
    tl.store(sums + chunk, total)


@jit
def sums_kernel(values, sums, count, CHUNK: tl.constexpr):
    """One program: the sum of one CHUNK of `count` values."""
    first = tl.program_id(0) * CHUNK
    tl.store(sums + tl.program_id(0), _sum(values + first, count - first, CHUNK, False, False))


@jit
def _sum(pointer, left, CHUNK: tl.constexpr, WHOLE: tl.constexpr, SQUARE: tl.constexpr):
    """The sum of CHUNK values or squares, zero past the `left` first, as `exact.row_sums` adds a row."""
    lane = tl.arange(0, 8)[:, None] * 128 + tl.arange(0, 128)[None, :]
    lanes = tl.zeros((8, 128), dtype=tl.float32)
    for step in tl.static_range(CHUNK // 1024):
        column = step * 1024 + lane
        if WHOLE:
            values = tl.load(pointer + column).to(tl.float32)
        else:
            values = tl.load(pointer + column, mask=column < left, other=0.0).to(tl.float32)
        lanes += values * values if SQUARE else values
    return kernel_lane_sum(lanes)
