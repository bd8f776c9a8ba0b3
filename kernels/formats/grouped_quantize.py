"""Quantisation for GEMMs over tokens grouped by expert (kernels.gemms.grouped_gemm).

Tokens are sorted by expert: those of expert e are rows offsets[e] to offsets[e + 1]. `offsets` (int32 or
int64, [experts + 1], rising from 0) stays on the device: nothing here waits for its values. Rows past
offsets[experts], the unused end of a buffer of fixed size, belong to no expert. The values of offsets are
checked on a CPU only.

Tiles along tokens. For wgrad both operands are quantised in tiles of 128 tokens. A tile must not span two
experts, or the small gradients of one would take the scale of the other, and the tile would have to be masked
inside the product. So the tiles of an expert start at its first token, and its last tile is filled up with
zeros: `quantize_tokens` lays the experts out one after the other, each in whole groups of 128 columns. That
costs at most 127 columns an expert, and makes every load of the GEMM aligned and free of masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import runs_triton
from kernels.formats import square
from kernels.formats.quantize import (
    BLOCKS,
    TILE,
    TILES,
    Quantized,
    check_scales,
    check_types,
    check_values,
    dequantize,
    empty_quantized,
    encode,
    launch_blocks,
    quantize_reference,
)
from kernels.formats.transpose import encode_columns


@dataclass(frozen=True)
class QuantizedExperts:
    """The weights of all experts in FP8: E4M3 `codes` [experts, N, K], an FP32 scale for each 128x128 block.

    `scales` is [experts, ceil(N / 128), ceil(K / 128)]: blocks start anew in every expert. Both tensors are
    contiguous.

    Raises:
        ValueError, TypeError: the parts do not fit together.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        check_types("QuantizedExperts", "codes", self.codes, self.scales, torch.float8_e4m3fn)
        if self.codes.dim() != 3 or self.codes.shape[0] == 0:
            raise ValueError(
                f"QuantizedExperts: codes have shape {tuple(self.codes.shape)}; "
                "they must be [experts, N, K] with at least one expert"
            )
        experts, n, k = self.codes.shape
        expected = (experts, -(-n // TILE), -(-k // TILE))
        described = f"codes {tuple(self.codes.shape)} in blocks of {BLOCKS} need"
        check_scales("QuantizedExperts", "codes", self.codes, self.scales, expected, described)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weights, [experts, N, K]."""
        return self.codes.shape

    def expert(self, index: int) -> Quantized:
        """The matrix [N, K] of one expert, sharing memory."""
        return Quantized(self.codes[index], self.scales[index], BLOCKS)

    def transpose(self) -> QuantizedExperts:
        """Every expert transposed, [experts, K, N] (for dgrad): codes and scales moved, no value changed."""
        return QuantizedExperts(self.codes.mT.contiguous(), self.scales.mT.contiguous())


def quantize_experts(w: torch.Tensor, *, power_of_two: bool = False) -> QuantizedExperts:
    """Quantise weights [experts, N, K] (FP32 or BF16, any strides) in 128x128 blocks that start anew in each.

    Raises:
        TypeError, ValueError: `w` is not FP32 or BF16, or has not three dimensions.
        RuntimeError: `w` is on a GPU without FP8 support.
    """
    _check_experts("quantize_experts", w)
    if runs_triton(w):
        return quantize_experts_triton(w, power_of_two=power_of_two)
    return quantize_experts_reference(w, power_of_two=power_of_two)


def quantize_experts_both(
    w: torch.Tensor, *, power_of_two: bool = False
) -> tuple[QuantizedExperts, QuantizedExperts]:
    """`quantize_experts` of w [experts, N, K], and of every expert transposed, [experts, K, N], in one pass.

    The same as `quantize_experts(w)` and its `transpose()`: the operands of fprop and dgrad.

    Raises:
        TypeError, ValueError: `w` is not FP32 or BF16, or has not three dimensions.
        RuntimeError: `w` is on a GPU without FP8 support.
    """
    _check_experts("quantize_experts_both", w)
    if runs_triton(w):
        return quantize_experts_both_triton(w, power_of_two=power_of_two)
    q = quantize_experts_reference(w, power_of_two=power_of_two)
    return q, q.transpose()


def quantize_experts_reference(w: torch.Tensor, *, power_of_two: bool = False) -> QuantizedExperts:
    """The PyTorch reference, on any device: the kernels must agree with it bit for bit."""
    codes, scales = _empty_experts(w)
    for expert, matrix in enumerate(w):
        q = quantize_reference(matrix, BLOCKS, power_of_two=power_of_two)
        codes[expert], scales[expert] = q.codes, q.scales
    return QuantizedExperts(codes, scales)


def quantize_experts_triton(w: torch.Tensor, *, power_of_two: bool = False) -> QuantizedExperts:
    """The Triton kernel: what `quantize_experts` runs on a GPU."""
    codes, scales = _empty_experts(w)
    launch_blocks(w, codes, scales, power_of_two)
    return QuantizedExperts(codes, scales)


def quantize_experts_both_triton(
    w: torch.Tensor, *, power_of_two: bool = False
) -> tuple[QuantizedExperts, QuantizedExperts]:
    """The Triton kernel: what `quantize_experts_both` runs on a GPU."""
    along_rows, along_columns = _empty_experts(w), _empty_experts(w.mT)
    square.launch(
        w, None, None, along_rows, along_columns, -(-w.shape[1] // TILE), w.shape[2],
        block=True, power_of_two=power_of_two,
    )  # fmt: skip
    return QuantizedExperts(*along_rows), QuantizedExperts(*along_columns)


def token_groups(tokens: int, experts: int) -> int:
    """The most groups of 128, none shared by two experts, that this many tokens and experts can fill."""
    return (tokens + (TILE - 1) * experts) // TILE


def quantize_tokens(x: torch.Tensor, offsets: torch.Tensor, *, power_of_two: bool = False) -> Quantized:
    """Transpose x [tokens, channels] (FP32 or BF16) and quantise it along the tokens of each expert.

    The result, [channels, 128 * token_groups(tokens, experts)] in 1x128 tiles, holds the experts one after
    the other, each from the start of a tile; the end of its last tile, and all tiles after the last expert,
    are zeros. Its width does not depend on the values of `offsets`.

    Raises:
        TypeError, ValueError: `x` is not an FP32 or BF16 matrix, or `offsets` does not fit it.
        RuntimeError: `x` is on a GPU without FP8 support.
    """
    _check_tokens("quantize_tokens", x, offsets)
    if runs_triton(x):
        return quantize_tokens_triton(x, offsets, power_of_two=power_of_two)
    return quantize_tokens_reference(x, offsets, power_of_two=power_of_two)


def quantize_tokens_both(
    x: torch.Tensor, offsets: torch.Tensor, *, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """x [tokens, channels] (FP32 or BF16) in 1x128 tiles of channels, and `quantize_tokens` of it, read once.

    Rows past the last offset belong to no expert: they are not read, and are zeros in both.

    Raises:
        TypeError, ValueError: `x` is not an FP32 or BF16 matrix, or `offsets` does not fit it.
        RuntimeError: `x` is on a GPU without FP8 support.
    """
    _check_tokens("quantize_tokens_both", x, offsets)
    if runs_triton(x):
        return quantize_tokens_both_triton(x, offsets, power_of_two=power_of_two)
    return quantize_tokens_both_reference(x, offsets, power_of_two=power_of_two)


def requantize_tokens(q: Quantized, offsets: torch.Tensor, *, power_of_two: bool = False) -> Quantized:
    """`quantize_tokens` of a matrix [tokens, channels] that is in 1x128 tiles of channels, in one pass.

    Raises:
        TypeError, ValueError: `q` is in 128x128 blocks, or `offsets` does not fit it.
        RuntimeError: `q` is on a GPU without FP8 support.
    """
    if q.block != TILES:
        raise ValueError(f"requantize_tokens: q is quantised in blocks of {q.block}; use quantize_tiles")
    check_offsets("requantize_tokens", offsets, q.shape[0], q.codes.device)
    if runs_triton(q.codes):
        return quantize_tokens_triton(q, offsets, power_of_two=power_of_two)
    return quantize_tokens_reference(q, offsets, power_of_two=power_of_two)


def quantize_tokens_reference(
    x: torch.Tensor | Quantized, offsets: torch.Tensor, *, power_of_two: bool = False
) -> Quantized:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""
    tokens, channels = x.shape
    token, valid = _token_rows(offsets, tokens)

    def values_of(rows: slice) -> torch.Tensor:
        if tokens == 0:  # a gather needs a row to read
            return torch.zeros((token[rows].numel(), channels), device=offsets.device)
        if isinstance(x, Quantized):
            codes = x.codes.view(torch.uint8).index_select(0, token[rows]).view(x.codes.dtype)
            values = dequantize(Quantized(codes, x.scales.index_select(0, token[rows]), TILES))
        else:
            values = x.index_select(0, token[rows])
        return values.masked_fill_(~valid[rows, None], 0.0)

    return encode_columns(values_of, (token.numel(), channels), offsets.device, power_of_two)


def quantize_tokens_both_reference(
    x: torch.Tensor, offsets: torch.Tensor, *, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""
    nobody = (torch.arange(x.shape[0], device=x.device) >= offsets[-1])[:, None]
    codes, scales = encode(
        lambda rows: x[rows].masked_fill(nobody[rows], 0.0), x.shape, TILES, x.device, power_of_two
    )
    rows = Quantized(codes, scales, TILES)
    return rows, quantize_tokens_reference(x, offsets, power_of_two=power_of_two)


def quantize_tokens_triton(
    x: torch.Tensor | Quantized, offsets: torch.Tensor, *, power_of_two: bool = False
) -> Quantized:
    """The Triton kernel: what `quantize_tokens` and `requantize_tokens` run on a GPU."""
    values, scales = (x.codes, x.scales) if isinstance(x, Quantized) else (x, None)
    along_tokens = _empty_tokens(values, offsets)
    groups = along_tokens[1].shape[1]
    square.launch(values, scales, offsets, None, along_tokens, groups, x.shape[1], power_of_two=power_of_two)
    return Quantized(*along_tokens, TILES)


def quantize_tokens_both_triton(
    x: torch.Tensor, offsets: torch.Tensor, *, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """The Triton kernel: what `quantize_tokens_both` runs on a GPU."""
    along_rows, along_tokens = empty_quantized(x, TILES), _empty_tokens(x, offsets)
    # The rows of no expert count as those of one more.
    groups = token_groups(x.shape[0], offsets.numel())
    square.launch(x, None, offsets, along_rows, along_tokens, groups, x.shape[1], power_of_two=power_of_two)
    return Quantized(*along_rows, TILES), Quantized(*along_tokens, TILES)


def _empty_tokens(x: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = token_groups(x.shape[0], offsets.numel() - 1)
    codes = torch.empty((x.shape[1], groups * TILE), dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty((x.shape[1], groups), dtype=torch.float32, device=x.device)


def _empty_experts(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts, n, k = w.shape
    codes = torch.empty((experts, n, k), dtype=torch.float8_e4m3fn, device=w.device)
    return codes, torch.empty((experts, -(-n // TILE), -(-k // TILE)), dtype=torch.float32, device=w.device)


def group_starts(offsets: torch.Tensor) -> torch.Tensor:
    """The first group of 128 tokens of each expert, and the end of the last: int64, [experts + 1]."""
    groups = (offsets.long().diff() + (TILE - 1)) // TILE
    return torch.nn.functional.pad(groups.cumsum(0), (1, 0))


def _token_rows(offsets: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each column of `quantize_tokens`, the token that it holds and whether it holds one."""
    experts = offsets.numel() - 1
    starts, offsets = group_starts(offsets), offsets.long()
    group = torch.arange(token_groups(tokens, experts), device=offsets.device)
    expert = torch.searchsorted(starts[1:], group, right=True).clamp_(max=experts - 1)
    first = offsets[expert] + (group - starts[expert]) * TILE
    row = first[:, None] + torch.arange(TILE, device=offsets.device)
    valid = row < offsets[expert + 1][:, None]
    return row.masked_fill_(~valid, 0).view(-1), valid.view(-1)


def _check_experts(function: str, w: torch.Tensor) -> None:
    if w.dim() != 3 or w.shape[0] == 0:
        raise ValueError(
            f"{function}: the tensor has shape {tuple(w.shape)}; "
            "pass [experts, N, K] with at least one expert"
        )
    check_values(function, "the tensor", w, w, "it")


def _check_tokens(function: str, x: torch.Tensor, offsets: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}; pass a matrix [tokens, channels]")
    check_values(function, "x", x, x, "x")
    check_offsets(function, offsets, x.shape[0], x.device)


def check_offsets(function: str, offsets: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Raise ValueError or TypeError, naming `function`, if `offsets` do not fit `tokens` rows on `device`."""
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: offsets are {offsets.dtype}; use torch.int32 or torch.int64")
    if offsets.dim() != 1 or offsets.numel() < 2 or not offsets.is_contiguous():
        raise ValueError(
            f"{function}: offsets have shape {tuple(offsets.shape)}; pass a contiguous vector [experts + 1]"
        )
    if offsets.device != device:
        raise ValueError(f"{function}: offsets are on {offsets.device} and the tokens on {device}")
    if offsets.device.type == "cpu":
        values = offsets.tolist()
        if values[0] != 0 or values[-1] > tokens or values != sorted(values):
            raise ValueError(
                f"{function}: offsets are {values}; they must rise from 0 to at most the {tokens} tokens"
            )
