"""A SwiGLU network whose six GEMMs run in FP8: a dense one, and all experts of a layer (report, section 3.3).

    forward    both   = x @ gate_up.T                      [tokens, 2F], the gates first
               hidden = silu(gate) * up * weight           straight into the tiles of the next GEMM
               y      = hidden @ down.T
    backward   hidden and its gradient anew from `both`; dx, dgate_up, ddown, dweight

`weight` is the routing weight of a token at its expert: it goes onto the hidden values, which are fewer than
the outputs. For the backward pass x and `both` wait in FP8 and nothing else does (section 3.3.3). The forward
pass uses `both` as its GEMM made it: caching costs no precision there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.formats.grouped_quantize import check_offsets
from kernels.formats.quantize import TILES, Quantized, quantize_tiles
from kernels.fused.swiglu import swiglu_backward, swiglu_quantize
from kernels.layers.activation import FP8Activation
from kernels.layers.operand import FP8Operand, values_and_tiles
from kernels.layers.products import EachExpert, OneWeight, Products
from kernels.layers.weight import FP8Weight
from kernels.layers.wgrad import MainGrad, WgradQueue

MainGrads = tuple[MainGrad, MainGrad]


def fp8_mlp(
    x: torch.Tensor | FP8Activation,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    power_of_two: bool = False,
    copies: tuple[FP8Weight, FP8Weight] | None = None,
    main_grads: MainGrads | None = None,
    queue: WgradQueue | None = None,
) -> torch.Tensor:
    """The SwiGLU network of all tokens: [..., D] -> [..., D], in the type of x.

    x is [..., D], gate_up [2F, D] (gate rows first), down [D, F], each FP32 or BF16, on one device. Each
    gradient has the type of its tensor. There may be no tokens. `copies` and `main_grads` are those of
    gate_up and down; they and the other options are described at `kernels.layers.linear.fp8_linear`.

    Raises:
        ValueError, TypeError: shapes, types, devices or options do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support, or a copy is used after its scope.
    """
    _check("fp8_mlp", x, gate_up, down, 2)
    reads = _reads("fp8_mlp", gate_up, down, copies, main_grads, queue, power_of_two)
    values, tiles, x_power_of_two = values_and_tiles(x)
    y = FP8SwiGLU.apply(values, gate_up, down, None, tiles, x_power_of_two, OneWeight(), *reads)
    return y.view(*x.shape[:-1], down.shape[0])


def fp8_experts(
    x: torch.Tensor | FP8Activation,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    power_of_two: bool = False,
    weight_power_of_two: bool | None = None,
    copies: tuple[FP8Weight, FP8Weight] | None = None,
    main_grads: MainGrads | None = None,
    queue: WgradQueue | None = None,
) -> torch.Tensor:
    """The SwiGLU network of each token's expert: rows [rows, D] sorted by expert -> [rows, D], same order.

    x is [rows, D], gate_up [experts, 2F, D] (gate rows first), down [experts, D, F], weights [rows], each
    FP32 or BF16. Rows of expert e are offsets[e] to offsets[e + 1] (int32 or int64, [experts + 1], on the
    same device, never read by the host on a GPU). Each output is multiplied with its weight, if there are
    weights. Rows past the last offset give zeros and zero gradients; an expert without rows gets a gradient
    of zeros. The options are those of `fp8_mlp`; `weight_power_of_two` is for the scales of gate_up and down
    where they differ from those of activations and gradients.

    Raises:
        ValueError, TypeError: shapes, types, devices, offsets or options do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support, or a copy is used after its scope.
    """
    _check("fp8_experts", x, gate_up, down, 3)
    check_offsets("fp8_experts", offsets, x.shape[0], x.device)
    if offsets.numel() != gate_up.shape[0] + 1:
        raise ValueError(
            f"fp8_experts: there are {offsets.numel()} offsets and {gate_up.shape[0]} experts; "
            "pass one offset more than experts"
        )
    if weights is not None and tuple(weights.shape) != (x.shape[0],):
        raise ValueError(
            f"fp8_experts: weights have shape {tuple(weights.shape)}; x {tuple(x.shape)} "
            f"needs {(x.shape[0],)}"
        )
    powers_of_two = (power_of_two, weight_power_of_two)
    reads = _reads("fp8_experts", gate_up, down, copies, main_grads, queue, *powers_of_two)
    values, tiles, x_power_of_two = values_and_tiles(x)
    return FP8SwiGLU.apply(values, gate_up, down, weights, tiles, x_power_of_two, EachExpert(offsets), *reads)


class FP8SwiGLU(torch.autograd.Function):
    """The autograd function behind `fp8_mlp` and `fp8_experts`, over matrices."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        weights: torch.Tensor | None,
        tiles: Quantized | None,
        x_power_of_two: bool,
        products: Products,
        read_gate_up: FP8Operand,
        read_down: FP8Operand,
    ) -> torch.Tensor:
        power_of_two = read_down.power_of_two
        need_x, need_gate_up, _, need_weights = ctx.needs_input_grad[:4]
        if tiles is None:
            tiles = quantize_tiles(x, power_of_two=power_of_two)
        both = products.product(tiles, read_gate_up.blocks(gate_up), x.dtype)
        hidden = swiglu_quantize(both, weights, power_of_two=power_of_two)
        # Only what a backward pass will read is kept alive.
        cached: tuple[torch.Tensor | None, ...] = (None, None)
        if any(ctx.needs_input_grad):
            both_fp8 = quantize_tiles(both, power_of_two=power_of_two)
            cached = (both_fp8.codes, both_fp8.scales)
        del both
        ctx.save_for_backward(
            *((tiles.codes, tiles.scales) if need_gate_up else (None, None)),
            *cached,
            weights,
            read_gate_up.kept(gate_up, need_x),
            read_down.kept(down, need_x or need_gate_up or need_weights),
        )
        ctx.products, ctx.reads, ctx.x_dtype = products, (read_gate_up, read_down), x.dtype
        ctx.turned_power_of_two = power_of_two or x_power_of_two
        return products.product(hidden, read_down.blocks(down), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_codes, x_scales, both_codes, both_scales, weights, gate_up, down = ctx.saved_tensors
        products, (read_gate_up, read_down) = ctx.products, ctx.reads
        power_of_two = read_down.power_of_two
        need_x, need_gate_up, need_down, need_weights = ctx.needs_input_grad[:4]
        both = Quantized(both_codes, both_scales, TILES)
        dx = d_gate_up = d_down = d_weights = None

        inner = need_x or need_gate_up or need_weights
        rows, by_token = products.both_ways(dy, inner, need_down, power_of_two)
        if by_token is not None:

            def hidden_by_token() -> Quantized:
                hidden = swiglu_quantize(both, weights, power_of_two=power_of_two)
                return products.turned(hidden, power_of_two)

            d_down = read_down.target.settle(products, by_token, hidden_by_token)
        if rows is not None:
            d_hidden = products.product(rows, read_down.transposed(down), ctx.x_dtype)
            d_both, d_weights = swiglu_backward(d_hidden, both, weights)
            del d_hidden
            rows, by_token = products.both_ways(d_both, need_x, need_gate_up, power_of_two)
            del d_both
            if rows is not None:
                dx = products.product(rows, read_gate_up.transposed(gate_up), ctx.x_dtype)
            if by_token is not None:
                x, turned_power_of_two = Quantized(x_codes, x_scales, TILES), ctx.turned_power_of_two
                d_gate_up = read_gate_up.target.settle(
                    products, by_token, lambda: products.turned(x, turned_power_of_two)
                )
        return dx, d_gate_up, d_down, d_weights if need_weights else None, None, None, None, None, None


def _reads(
    function: str,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    copies: tuple[FP8Weight, FP8Weight] | None,
    main_grads: MainGrads | None,
    queue: WgradQueue | None,
    power_of_two: bool,
    weight_power_of_two: bool | None = None,
) -> list[FP8Operand]:
    return [
        FP8Operand(function, weight, copy, main_grad, queue, power_of_two, weight_power_of_two)
        for weight, copy, main_grad in zip(
            (gate_up, down), copies or (None, None), main_grads or (None, None), strict=True
        )
    ]


def _check(
    function: str, x: torch.Tensor | FP8Activation, gate_up: torch.Tensor, down: torch.Tensor, dims: int
) -> None:
    fits = gate_up.dim() == down.dim() == dims and gate_up.shape[:-2] == down.shape[:-2]
    fits = fits and gate_up.shape[-2] == 2 * down.shape[-1] and gate_up.shape[-1] == down.shape[-2]
    if not fits or len(x.shape) < 1 or (dims == 3 and len(x.shape) != 2) or x.shape[-1] != gate_up.shape[-1]:
        wanted = "[..., D], [2F, D] and [D, F]"
        if dims == 3:
            wanted = "[rows, D], [experts, 2F, D] and [experts, D, F]"
        raise ValueError(
            f"{function}: x is {tuple(x.shape)}, gate_up {tuple(gate_up.shape)} and down "
            f"{tuple(down.shape)}; they must be {wanted}"
        )
    if not x.device == gate_up.device == down.device:
        raise ValueError(
            f"{function}: x is on {x.device}, gate_up on {gate_up.device} and down on {down.device}; "
            "move them to one device"
        )
