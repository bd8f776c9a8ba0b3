"""Memory in which it shows what a kernel leaves unwritten, and what it writes past the end of a tensor."""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch

MARGIN = 2**17  # bytes behind each tensor
PATTERN = 0xA5


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """In this context `torch.empty` returns memory full of PATTERN, with a margin that must stay so."""
    margins = []

    def empty(*shape, dtype: torch.dtype = torch.float32, device: object = None) -> torch.Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((size + MARGIN,), PATTERN, dtype=torch.uint8, device=device)
        margins.append(memory[size:])
        return memory[:size].view(dtype).view(shape)

    with mock.patch("torch.empty", empty):
        yield
    assert margins, "nothing was allocated"
    assert all(margin.eq(PATTERN).all() for margin in margins), "a kernel wrote past the end of a tensor"
