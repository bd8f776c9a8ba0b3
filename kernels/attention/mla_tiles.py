"""What the kernels of multi-head latent attention share: widths, documents, and tiles in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernels import backend
from kernels.backend import jit, tl
from kernels.gemms.gemm_tiles import multiprocessors

SHARED = 227 * 1024  # bytes of shared memory that a program may use on Hopper, which tiles are made for
LOG2E = 1.4426950408889634
CHUNK = 128  # queries whose scores the references hold at one time


@dataclass(frozen=True)
class Config:
    """Launch shape: scores of block_m queries and block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options. Fusion makes scaling and adding scores one instruction."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def supported(device: torch.device) -> bool:
    """Whether the attention kernels run on a device: an NVIDIA GPU from Hopper on, with Triton.

    Their tiles fill the shared memory of a Hopper multiprocessor; older GPUs have less, and so have newer
    ones that are made for workstations.
    """
    if device.type != "cuda" or torch.version.hip is not None or backend.triton is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0) and multiprocessors(device)[1] >= SHARED


def runs_triton(name: str, tensor: torch.Tensor) -> bool:
    """Whether `name` runs its Triton kernels on `tensor` (CUDA) or the PyTorch reference (elsewhere).

    Raises:
        RuntimeError: the tensor is on a GPU that the kernels do not support; a silent fallback would be slow.
    """
    if tensor.is_cuda and not supported(tensor.device):
        raise RuntimeError(
            f"{name}: the tensor is on {torch.cuda.get_device_name(tensor.device)}, and the kernels need "
            "Triton and an NVIDIA GPU of compute capability (9, 0) or later with 227 KiB of shared memory; "
            "use torch.nn.functional.scaled_dot_product_attention there, or move the tensors to the CPU"
        )
    return tensor.is_cuda


def widths(q: torch.Tensor, key_value: torch.Tensor, key_rotary: torch.Tensor) -> tuple[int, int, int]:
    """(N, R, V): the widths of content, of the rotary part and of a value."""
    rotary = key_rotary.shape[-1]
    content = q.shape[-1] - rotary
    return content, rotary, key_value.shape[-1] - content


def check_widths(name: str, found: tuple[int, ...], most: tuple[int, ...]) -> None:
    """Raise ValueError where a width is more than `most`: tiles would not fit into shared memory."""
    if any(width > limit for width, limit in zip(found, most, strict=True)):
        raise ValueError(
            f"{name}: the widths are {found}, and the tiles of the kernels hold at most {most}; use "
            "torch.nn.functional.scaled_dot_product_attention there, or move the tensors to the CPU"
        )


def padded_width(width: int) -> int:
    """The width that a kernel computes with: a power of two of at least 16, the rest filled with zeros."""
    return max(16, 1 << (width - 1).bit_length())


def width_constants(sizes: tuple[int, int, int]) -> dict[str, int]:
    """Compile-time constants of a kernel: the widths, and what they are padded to."""
    named = dict(zip("NRV", sizes, strict=True))
    return {**named, **{f"{name}_PAD": padded_width(width) for name, width in named.items()}}


def score_chunks(
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    scale: float,
    starts: torch.Tensor | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """CHUNK queries at a time and their scores [B, H, queries, keys], FP32, minus infinity where not seen.

    The keys are those up to the last query of the chunk.
    """
    content = widths(q, key_value, key_rotary)[0]
    positions = torch.arange(q.shape[1], device=q.device)
    for begin in range(0, q.shape[1], CHUNK):
        rows = slice(begin, min(begin + CHUNK, q.shape[1]))
        queries, keys = q[:, rows].float(), key_value[:, : rows.stop, :, :content].float()
        scores = torch.einsum("bmhn,blhn->bhml", queries[..., :content], keys)
        shared = key_rotary[:, : rows.stop].float()
        scores += torch.einsum("bmhr,blr->bhml", queries[..., content:], shared)
        hidden = positions[: rows.stop] > positions[rows, None]
        if starts is not None:
            hidden = (hidden | (positions[: rows.stop] < starts[:, rows, None]))[:, None]
        yield rows, scores.mul_(scale).masked_fill_(hidden, float("-inf"))


def document_starts(segments: torch.Tensor) -> torch.Tensor:
    """The position at which each position's document begins: int32 [B, T] from segment numbers [B, T].

    A document is a run of equal numbers; padding (-1) is one too. Nothing is read by the host.

    Raises:
        ValueError: `segments` is not a matrix.
    """
    if segments.dim() != 2:
        raise ValueError(
            f"document_starts: segments have shape {tuple(segments.shape)}; pass [batch, positions]"
        )
    positions = torch.arange(segments.shape[1], dtype=torch.int32, device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, positions, 0).cummax(dim=1).values


def document_ends(starts: torch.Tensor) -> torch.Tensor:
    """The position after the last one of each position's document: int32 [B, T] from `starts` [B, T]."""
    return torch.searchsorted(starts, starts, right=True, out_int32=True)


@jit
def load_rows(at, rows, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A tile of `rows`, `stride` apart, of a matrix that begins `at`; columns from WIDTH to PADDED are 0."""
    col = tl.arange(0, PADDED)
    pointers = at + rows[:, None] * stride + col[None, :]
    if WIDTH == PADDED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(col < WIDTH)[None, :], other=0.0)


@jit
def store_rows(at, values, rows, inside, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write the rows of a tile that are `inside`, in the type of the memory."""
    col = tl.arange(0, PADDED)
    mask = inside[:, None] & (col < WIDTH)[None, :]
    tl.store(at + rows[:, None] * stride + col[None, :], values.to(at.dtype.element_ty), mask=mask)


@jit
def position_of(step, low, lead, then, BLOCK: tl.constexpr):
    """First position of tile number `step`: `lead` tiles begin at `low`, and those after them at `then`."""
    return tl.where(step < lead, low + step * BLOCK, then + (step - lead) * BLOCK)


@jit
def document_tiles(starts, first, row_in, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the documents of BLOCK_M queries begin, from `first` on.

    The first position of each query's, the first tile of keys that one of them sees, and the end of the tiles
    in which a query may meet an earlier document.
    """
    start = tl.load(starts + first + row_in)
    low = tl.load(starts + first) // BLOCK_N * BLOCK_N
    last = tl.load(starts + tl.minimum(first + BLOCK_M, T) - 1)
    return start, low, tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, first)
