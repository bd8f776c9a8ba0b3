"""An activation in FP8 that gradients flow through: quantised once for all layers that read it.

FP8 codes cannot carry a gradient of their own: autograd would cast it to FP8. So beside the codes there is an
anchor, a tensor of the same shape without memory of its own (every element is one and the same NaN), which
stands for the activation in autograd's graph. Layers read the codes and send their gradients to the anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.formats.quantize import TILES, Quantized, quantize_tiles
from kernels.fused.permute import Plan, combine, gather


@dataclass(frozen=True)
class FP8Activation:
    """`tiles` [rows, cols] in 1x128 tiles, and the `anchor` [..., cols] (FP32 or BF16) that takes gradients.

    The type of the anchor is that of gradients, and of what layers make from the activation. A dispatch that
    receives codes from elsewhere makes both itself: the gradient of its anchor is what it sends back.
    `power_of_two` says that all scales are powers of two; the tiles along the tokens, which weight gradients
    need, then get such scales too, and the second rounding costs nothing (report, section 3.3.3).

    Raises:
        ValueError, TypeError: the parts do not fit together.
    """

    tiles: Quantized
    anchor: torch.Tensor
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.tiles.block != TILES:
            raise ValueError(f"FP8Activation: blocks are {self.tiles.block}; quantise it with quantize_tiles")
        if self.anchor.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"FP8Activation: the anchor is {self.anchor.dtype}; use float32 or bfloat16")
        rows, cols = self.tiles.shape
        if self.anchor.shape[-1:] != (cols,) or self.anchor.shape[:-1].numel() != rows:
            raise ValueError(
                f"FP8Activation: the anchor is {tuple(self.anchor.shape)}; tiles {tuple(self.tiles.shape)} "
                "need the same columns, and as many rows"
            )

    @property
    def shape(self) -> torch.Size:
        return self.anchor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        return self.tiles.codes.device


def fp8_activation(x: torch.Tensor, *, power_of_two: bool = False) -> FP8Activation:
    """x [..., cols] (FP32 or BF16) in 1x128 tiles; its gradient is that of the activation, unchanged.

    Raises:
        TypeError, ValueError: `x` is not FP32 or BF16, or has no dimension.
        RuntimeError: `x` is on a GPU without FP8 support.
    """
    if x.dim() < 1:
        raise ValueError("fp8_activation: x has no dimension; pass [..., cols]")
    codes, scales, anchor = _Quantize.apply(x, power_of_two)
    return FP8Activation(Quantized(codes, scales, TILES), anchor, power_of_two)


def permute_fp8(x: FP8Activation, plan: Plan) -> FP8Activation:
    """Rows [tokens * K, cols] of x [tokens, cols] in the order of `plan` (`permute.py`), codes copied.

    The gradient of a token is the FP32 sum over its rows, slot by slot.

    Raises:
        ValueError: the plan is for another number of tokens, or on another device.
    """
    tokens = plan.place.shape[0]
    if x.tiles.shape[0] != tokens or x.device != plan.pair.device:
        raise ValueError(
            f"permute_fp8: x is {tuple(x.shape)} on {x.device}; "
            f"the plan is for {tokens} tokens on {plan.pair.device}"
        )
    codes, scales, anchor = _Permute.apply(x.anchor, x.tiles, plan)
    return FP8Activation(Quantized(codes, scales, TILES), anchor, x.power_of_two)


def empty_anchor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An anchor of this shape: NaN everywhere, so that reading it for the values does not go unnoticed."""
    return torch.full((1,) * len(shape), torch.nan, dtype=dtype, device=device).expand(shape)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, ...]:
        tiles = quantize_tiles(x.reshape(-1, x.shape[-1]), power_of_two=power_of_two)
        ctx.mark_non_differentiable(tiles.codes, tiles.scales)
        ctx.set_materialize_grads(False)
        return tiles.codes, tiles.scales, empty_anchor(x.shape, x.dtype, x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _codes: None, _scales: None, grad: torch.Tensor | None) -> tuple[Any, None]:
        return grad, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tiles: Quantized, plan: Plan) -> tuple[torch.Tensor, ...]:
        ctx.plan = plan
        codes = gather(tiles.codes.view(torch.uint8), plan).view(tiles.codes.dtype)
        scales = gather(tiles.scales, plan)
        ctx.mark_non_differentiable(codes, scales)
        ctx.set_materialize_grads(False)
        return codes, scales, empty_anchor(codes.shape, anchor.dtype, anchor.device)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _codes: None, _scales: None, grad: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        return None if grad is None else combine(grad, ctx.plan), None, None
