"""The linear layers of all experts, in grouped FP8 GEMMs (DeepSeek-V3 report, section 3.3 and figure 6).

    fprop   y[rows of e]  = x[rows of e] @ W[e].T     x in 1x128 tiles,   W in 128x128 blocks
    dgrad   dx[rows of e] = dy[rows of e] @ W[e]      dy in 1x128 tiles,  W in 128x128 blocks, transposed
    wgrad   dW[e] = dy[rows of e].T @ x[rows of e]    both in tiles of 128 tokens that start in each expert

Everything else is as in `kernels.layers.linear`.
"""

from __future__ import annotations

import torch

from kernels.layers.activation import FP8Activation
from kernels.layers.linear import FP8Linear
from kernels.layers.operand import FP8Operand, values_and_tiles
from kernels.layers.products import EachExpert
from kernels.layers.weight import FP8Weight
from kernels.layers.wgrad import MainGrad, WgradQueue


def fp8_grouped_linear(
    x: torch.Tensor | FP8Activation,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    *,
    power_of_two: bool = False,
    copy: FP8Weight | None = None,
    main_grad: MainGrad | None = None,
    queue: WgradQueue | None = None,
) -> torch.Tensor:
    """y = x @ weight[e].T for the tokens of each expert e: FP8 products, FP32 sums, forward and backward.

    x is [tokens, in], sorted by expert, weight [experts, out, in], each FP32 or BF16; y [tokens, out] has the
    type of x. Tokens of expert e are rows offsets[e] to offsets[e + 1] (int32 or int64, [experts + 1], on the
    same device, never read by the host on a GPU). Rows past the last offset give zeros and zero gradients.
    Each gradient has the type of its tensor; that of an expert without tokens is zero.

    An `FP8Activation` as x and the options are those of `fp8_linear`.

    Raises:
        ValueError, TypeError: shapes, types, devices, offsets or options do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support, or `copy` is used after its scope.
    """
    if len(x.shape) != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"fp8_grouped_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be [tokens, in] and [experts, out, in]"
        )
    if not x.device == weight.device == offsets.device:
        raise ValueError(
            f"fp8_grouped_linear: x is on {x.device}, weight on {weight.device} and offsets on "
            f"{offsets.device}; move them to one device"
        )
    read = FP8Operand("fp8_grouped_linear", weight, copy, main_grad, queue, power_of_two)
    values, tiles, x_power_of_two = values_and_tiles(x)
    return FP8Linear.apply(values, weight, tiles, x_power_of_two, EachExpert(offsets), read, False)
