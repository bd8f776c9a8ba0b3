"""Where the tensors of a list lie, for kernels that go over all of them in one launch.

A launch for each tensor would cost more than its work where tensors are many and small, and copying them into
one buffer would double the memory traffic. So a kernel is given a table of addresses instead: each program
takes one chunk of one tensor, finds the tensor in `owners` and its addresses in `rows`.

A pointer that comes out of a table says nothing of its alignment, and a mask makes every access narrow. So a
kernel takes its wide path, accesses of 16 bytes by promise of `start`, for whole chunks of tensors whose
addresses are multiples of 16, as those of torch are, and its narrow path for views that start elsewhere and
for the last chunk of a tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import call, is_

import torch

from kernels.backend import jit, tl


class TensorTable:
    """The addresses of columns of tensors, kept between calls and made anew when one of them has moved.

    It is also made anew on another CUDA stream than before: the copy that fills it is ordered, and its memory
    handed out again, by the stream that it was made on.

    Row i describes the i-th tensor of every column; those have the same number of elements.

    Attributes, after `update`:
        rows: int64 [tensors, 2 + columns]: the tensor's first chunk, its elements, its addresses.
        owners: int32 [chunks]: the row that each chunk belongs to. Empty tensors own none.
    """

    rows: torch.Tensor
    owners: torch.Tensor

    def __init__(self) -> None:
        self._layout: tuple[torch.device, int | None, int, list[int]] | None = None
        self._addresses: list[list[int]] = []
        self._firsts: list[int] = []
        # Weak, so that no gradient outlives its step because of the table.
        self._tensors: list[list[weakref.ref[torch.Tensor]]] = []

    def known(self, columns: Sequence[Sequence[torch.Tensor]]) -> list[bool]:
        """Of each of `columns`, whether it holds the very tensors of the last `update`, where they lay then.

        What a caller has found out about such tensors need not be looked at again. The loops run in C: with a
        thousand tensors in each column, loops in Python take longer than the kernel that reads the table.
        """
        if len(columns) != len(self._tensors):
            return [False] * len(columns)
        return [
            len(tensors) == len(column)
            and all(map(is_, map(call, tensors), column))
            and list(map(torch.Tensor.data_ptr, column)) == addresses
            for tensors, addresses, column in zip(self._tensors, self._addresses, columns, strict=True)
        ]

    def update(
        self, chunk: int, columns: Sequence[Sequence[torch.Tensor]], known: Sequence[bool] | None = None
    ) -> None:
        """Describe `columns`, of at least one tensor each, in chunks of `chunk` elements.

        `known` is what `known` says of them, where the caller has asked. If nothing has moved this compares
        numbers on the host. Otherwise the rows go to the device by a copy that the host does not wait for;
        `owners` are made anew only for other sizes, or on another stream.

        Raises:
            RuntimeError: something has moved while a CUDA graph is captured.
        """
        device = columns[0][0].device
        place = (device, _stream(device), chunk)
        known = self.known(columns) if known is None else known
        if all(known) and self._layout is not None and self._layout[:3] == place:
            return
        sizes = [tensor.numel() for tensor in columns[0]]
        addresses = [[tensor.data_ptr() for tensor in column] for column in columns]
        layout = (*place, sizes)
        tensors = [[weakref.ref(tensor) for tensor in column] for column in columns]
        if layout == self._layout and addresses == self._addresses:
            self._tensors = tensors
            return
        if _capturing(device):
            raise RuntimeError(
                "TensorTable: tensors have moved while a CUDA graph is captured, and a replay would read "
                "their old addresses; call once before the capture and keep the tensors where they are"
            )
        counts = [-(-size // chunk) for size in sizes]
        if layout != self._layout:
            ends = torch.tensor(counts).cumsum(0)
            self._firsts = [0, *ends[:-1].tolist()]
            self.owners = torch.repeat_interleave(
                _on_device(torch.tensor(counts), device), output_size=int(ends[-1])
            ).int()
        table = torch.tensor([self._firsts, sizes, *addresses], dtype=torch.int64)
        self.rows = _on_device(table.t().contiguous(), device)
        self._layout, self._addresses, self._tensors = layout, addresses, tensors

    @property
    def chunks(self) -> int:
        """The number of chunks: programs of a launch."""
        return self.owners.numel()


def _stream(device: torch.device) -> int | None:
    """The number of the current CUDA stream, None on other devices."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Only from pinned memory does a copy run while the host goes on.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@jit
def start(address, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """An address of the table as a pointer. WIDE promises one that four elements at a time fit.

    The promise is four elements, not 16 bytes, also for BF16: each thread then has the same elements of all
    tensors, whatever their types, and none need change threads.
    """
    pointer = address.to(tl.pointer_type(TYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, TYPE.primitive_bitwidth // 2)
    return pointer
