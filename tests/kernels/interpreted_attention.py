"""Run by test_mla_attention.py in a process of its own, under TRITON_INTERPRET=1.

The interpreter gets products of BF16 wrong, so everything is FP32; the tiles of BF16 are tried on FP32 too.
What a kernel leaves unwritten shows as NaN.
"""

import contextlib
import itertools
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from kernels.attention import mla_attention as forward
from kernels.attention import mla_attention_backward as backward
from kernels.attention.mla_tiles import document_starts

ODD, EVEN = (10, 8, 14), (16, 16, 32)
CONFIGS = (forward.CONFIGS, backward.DQ_CONFIGS, backward.DKV_CONFIGS)


def inputs(
    batch: int, length: int, heads: int, widths: tuple[int, int, int], generator: torch.Generator
) -> list[torch.Tensor]:
    """q, key_value and key_rotary."""
    n, r, v = widths
    shapes = ((batch, length, heads, n + r), (batch, length, heads, n + v), (batch, length, r))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def poisoned_empty_like(tensor: torch.Tensor, **options) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan, **options)


def poisoned_new_empty(tensor: torch.Tensor, *shape, **options) -> torch.Tensor:
    made = tensor.new_zeros(*shape, **options)
    return made.fill_(torch.nan) if made.is_floating_point() else made


@contextlib.contextmanager
def tiles_of(dtype: torch.dtype) -> Iterator[None]:
    """The tiles of this type for FP32."""
    with contextlib.ExitStack() as stack:
        for configs in CONFIGS:
            stack.enter_context(mock.patch.dict(configs, {torch.float32: configs[dtype]}))
        yield


def found_by_triton(parts: list[torch.Tensor], scale: float, starts: torch.Tensor | None, grad: torch.Tensor):
    """Output, log-sum-exp and gradients; unwritten places are NaN."""
    with (
        mock.patch.object(torch.Tensor, "new_empty", poisoned_new_empty),
        mock.patch("torch.empty_like", poisoned_empty_like),
        np.errstate(all="ignore"),  # infinity minus infinity is meant, and masked exponents overflow
    ):
        out, lse = forward.attention_triton(*parts, scale, starts)
        return out, lse, *backward.gradients_triton(grad, *parts, out, lse, scale, starts)


def expected_by_reference(
    parts: list[torch.Tensor], scale: float, starts: torch.Tensor | None, grad: torch.Tensor
):
    out, lse = forward.attention_reference(*parts, scale, starts)
    return out, lse, *backward.gradients_reference(grad, *parts, out, lse, scale, starts)


def documents(batch: int, length: int, generator: torch.Generator) -> list[torch.Tensor | None]:
    """Segments: none, random ones and padding, one for each position, and a short one at the very end."""
    packed = torch.randint(5, (batch, length), generator=generator).sort(1).values
    packed[:, length - length // 6 :] = -1
    lone = torch.arange(length).expand(batch, -1)
    late = (torch.arange(length) >= length - 2).int().expand(batch, -1)
    return [None, packed, lone, late]


def check_agreement(generator: torch.Generator) -> None:
    for (batch, length, heads), widths, tiles in (
        ((1, 1, 1), ODD, torch.float32),
        ((2, 7, 2), EVEN, torch.float32),
        ((1, 70, 1), ODD, torch.float32),
        ((1, 129, 1), ODD, torch.bfloat16),
        ((1, 300, 1), EVEN, torch.bfloat16),
    ):
        parts = inputs(batch, length, heads, widths, generator)
        grad = torch.randn(batch, length, heads, widths[2], generator=generator)
        for segments in documents(batch, length, generator):
            starts = None if segments is None else document_starts(segments)
            expected = expected_by_reference(parts, 0.3, starts, grad)
            with tiles_of(tiles):
                found = found_by_triton(parts, 0.3, starts, grad)
            for name, a, b in zip(("out", "lse", "q", "kv", "rotary"), found, expected, strict=True):
                # Of a document of one position dq and dk are 0 but for rounding.
                error = (a - b).norm() / b.norm().clamp(min=b.numel() ** 0.5)
                assert error < 2e-6, (batch, length, heads, widths, tiles, segments, name, error)


def check_surfacing(generator: torch.Generator) -> None:
    """A spoiled input spoils the row of its position, and no row of a tile that it is not in."""
    starts = document_starts(torch.tensor([[0] * 140 + [1] * 60]))
    for (part, position), bad in itertools.product(((0, 150), (1, 160), (2, 170)), (torch.nan, torch.inf)):
        parts = inputs(1, 200, 1, EVEN, generator)
        parts[part][0, position] = bad
        grad = torch.ones(1, 200, 1, 32)
        with tiles_of(torch.bfloat16):
            out, _, *gradients = found_by_triton(parts, 0.3, starts, grad)
        spoiled = out.isnan().any(-1).flatten()
        assert spoiled[position], (part, bad)
        assert not spoiled[:128].any()  # their tile does not hold the position
        assert all(gradient.isnan().any() for gradient in gradients), (part, bad)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    check_agreement(generator)
    check_surfacing(generator)
    print("interpreted kernels agree")


if __name__ == "__main__":
    main()
