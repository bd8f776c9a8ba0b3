"""Run by test_adamw.py in a process of its own, under TRITON_INTERPRET=1: bit for bit the references.

The interpreter cuts off where BF16 must be rounded and misreads subnormal BF16 numbers, so its conversions
are replaced by those of torch, which round to nearest even as the hardware does.
"""

import itertools
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from kernels.optim import adamw, grad_norm
from kernels.optim.tensor_table import TensorTable

SHAPES = [(1,), (), (0,), (3, 341), (1024,), (0, 4), (1025,), (2, 1024), (700, 5)]
BAD = (torch.nan, -torch.nan, torch.inf, -torch.inf, 1e25, -1e25, 1e-25, 2.0**-140)


def convert(values, source, target, rounding):
    """In place of the interpreter's `_convert_float`."""
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    assert (source, target) == (tl.bfloat16, tl.float32), (source, target)
    codes = torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)
    return codes.float().numpy().view(np.uint32)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, a NaN of any bits being equal to another."""
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(7.0).view(bits), expected.nan_to_num(7.0).view(bits)
    )


def placed(values: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy that starts `offset` elements into a buffer of sevens, and the buffer."""
    buffer = torch.full((values.numel() + offset + 8,), 7.0, dtype=values.dtype)
    view = buffer[offset : offset + values.numel()].view(values.shape)
    return view.copy_(values), buffer


def check_step(grad_type: torch.dtype, with_copies: bool, scaled: bool, offset: int) -> None:
    generator = torch.Generator().manual_seed(offset)
    columns = [
        [torch.randn(shape, generator=generator) for shape in SHAPES],
        [torch.zeros(shape, dtype=grad_type) for shape in SHAPES],
        *([torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES] for _ in range(2 + with_copies)),
    ]
    # Only every other list is odd, so that no address stands for all of them.
    shifts = [offset * (index % 2 == 0) for index in range(len(columns))]
    on_kernel = [[placed(t, shift) for t in column] for column, shift in zip(columns, shifts, strict=True)]
    found = [[view for view, _ in column] for column in on_kernel]
    table, grad_scale = TensorTable(), torch.tensor(0.37) if scaled else None
    for step in range(1, 4):
        for index, shape in enumerate(SHAPES):
            grad = torch.randn(shape, generator=generator)
            grad *= 10.0 ** torch.randint(-4, 3, shape, generator=generator)
            if step == 3 and grad.numel() > len(BAD):
                grad.view(-1)[-len(BAD) :] = torch.tensor(BAD)
            columns[1][index] = grad.to(grad_type)
            found[1][index].copy_(grad)
        factors = adamw._factors(1e-3 * step, (0.9, 0.95), 1e-8, 0.1, step)
        with np.errstate(all="ignore"):  # NaN and infinity are meant
            adamw.adamw_step_triton(found, factors, grad_scale, table)
        adamw.adamw_step_reference(columns, factors, grad_scale)
        names = ("master", "grad", "mean", "square", "copy")[: len(columns)]
        for name, column, expected in zip(names, found, columns, strict=True):
            for index, (tensor, right) in enumerate(zip(column, expected, strict=True)):
                assert same(tensor, right), (name, index, step, grad_type, with_copies, scaled, offset)
    for column, shift in zip(on_kernel, shifts, strict=True):
        for view, buffer in column:
            assert (buffer[:shift] == 7).all(), "written before the start"
            assert (buffer[shift + view.numel() :] == 7).all(), "written past the end"


def check_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for shapes, offset in ((SHAPES, 0), (SHAPES, 3), ([(9000,)], 0), ([(0,)], 0), ([()], 0)):
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        values = [placed(t * 10.0 ** (index % 3), offset)[0] for index, t in enumerate(values)]
        assert same(grad_norm.grad_norm_triton(values, TensorTable()), grad_norm.grad_norm_reference(values))
    for bad in BAD[:5]:
        with np.errstate(all="ignore"):
            found = grad_norm.grad_norm_triton([torch.tensor([1.0, bad]).to(dtype)], TensorTable())
        assert not found.isfinite(), bad
    # A second level of more than one program.
    sums, found = torch.randn(2 * grad_norm.CHUNK + 700, generator=generator), torch.empty(3)
    grad_norm.sums_kernel[(3,)](sums, found, sums.numel(), CHUNK=grad_norm.CHUNK)
    assert same(found, grad_norm._chunk_sums(sums))


def main() -> None:
    with mock.patch.object(interpreter, "_convert_float", convert):
        for grad_type, variant in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            check_step(grad_type, with_copies=variant, scaled=not variant, offset=0)
        check_step(torch.float32, with_copies=True, scaled=True, offset=3)
        for dtype in (torch.float32, torch.bfloat16):
            check_norm(dtype)
    print("interpreted kernels agree")


if __name__ == "__main__":
    main()
