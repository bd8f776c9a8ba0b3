"""SwiGLU fused with FP8 quantisation, and its backward pass (DeepSeek-V3 report, section 3.3.3).

    out = silu(gate) * up * weight      weight: the routing weight of a token at its expert, optional

The report caches the inputs of SwiGLU in FP8 and recomputes its output in the backward pass. So both
functions take the inputs either as values or as that FP8 cache, and neither writes the output in high
precision: the forward pass writes the FP8 operand of the next GEMM, the backward pass the gradients.

All arithmetic is FP32, one correctly rounded operation a step; `exact.py` says how that covers the logistic
function and the sum for the weight's gradient. Reference and kernel agree bit for bit in everything they
return. The logistic function is not that of `torch.nn.functional.silu`: against the unfused functions a value
may differ in its last bits, and a code next to a midpoint by one.

The edges are those of `quantize.py`. An infinite gate of either sign gives NaN or infinity, as in
`torch.nn.functional.silu`, and so spoils its tile. For gates below -86.6 silu is zero (it is smaller than
1e-35).
"""

from __future__ import annotations

import torch

from kernels.backend import jit, runs_triton, tl
from kernels.formats.exact import kernel_lane_sum, kernel_sigmoids, row_sums, sigmoids
from kernels.formats.quantize import (
    TILE,
    TILES,
    Quantized,
    check_values,
    dequantize,
    empty_quantized,
    kernel_encode,
    kernel_scale,
    magnitude_bits,
    quantize_reference,
)

BAND_VALUES = 2**16  # values that the reference takes through the exponential at a time
QUANTIZED_TILES = 16  # that one program quantises: a thread then holds 16 values of one tile
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def swiglu_quantize(
    both: torch.Tensor | Quantized, weights: torch.Tensor | None = None, *, power_of_two: bool = False
) -> Quantized:
    """silu(gate) * up * weight in 1x128 tiles [rows, F].

    `both` is [rows, 2F], the gates first: FP32 or BF16 with any strides, or 1x128 tiles. `weights` is [rows],
    FP32 or BF16.

    Raises:
        TypeError, ValueError: types, shapes, blocks or devices do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support.
    """
    _check("swiglu_quantize", both, weights)
    function = swiglu_quantize_triton if runs_triton(_values(both)) else swiglu_quantize_reference
    return function(both, weights, power_of_two=power_of_two)


def swiglu_backward(
    dy: torch.Tensor, both: torch.Tensor | Quantized, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of silu(gate) * up * weight, given `dy` [rows, F], the gradient of that product.

    `both` and `weights` are those of `swiglu_quantize`; `dy` is FP32 or BF16 with any strides. Returns the
    gradient of `both` [rows, 2F] in the type of `dy`, and that of the weights [rows] in their type, or None.
    Quantisation counts as the identity: the gradients are those of the product before it.

    Raises:
        TypeError, ValueError: types, shapes, blocks or devices do not fit.
        RuntimeError: the tensors are on a GPU without FP8 support.
    """
    _check("swiglu_backward", both, weights)
    rows, width = both.shape[0], both.shape[1] // 2
    if tuple(dy.shape) != (rows, width):
        raise ValueError(
            f"swiglu_backward: dy has shape {tuple(dy.shape)}; both {tuple(both.shape)} needs {(rows, width)}"
        )
    check_values("swiglu_backward", "dy", dy, _values(both), "both")
    function = swiglu_backward_triton if runs_triton(dy) else swiglu_backward_reference
    return function(dy, both, weights)


def swiglu_quantize_reference(
    both: torch.Tensor | Quantized, weights: torch.Tensor | None = None, *, power_of_two: bool = False
) -> Quantized:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""
    gate, up = _halves(both)
    sigmoid, _ = _sigmoids(gate)
    product = sigmoid.mul_(gate).mul_(up)
    if weights is not None:
        product.mul_(weights.float()[:, None])
    return quantize_reference(product, TILES, power_of_two=power_of_two)


def swiglu_backward_reference(
    dy: torch.Tensor, both: torch.Tensor | Quantized, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The PyTorch reference, on any device: the kernel must agree with it bit for bit."""
    gate, up = _halves(both)
    grad = dy.float()
    sigmoid, complement = _sigmoids(gate)
    silu = gate * sigmoid
    d_weights = None
    if weights is not None:
        d_weights = row_sums(grad * (silu * up)).to(weights.dtype)
        grad = grad * weights.float()[:, None]
    d_both = torch.empty(both.shape, dtype=dy.dtype, device=dy.device)
    d_gate, d_up = d_both.chunk(2, dim=1)
    d_gate.copy_(complement.mul_(gate).add_(1.0).mul_(sigmoid).mul_(grad * up))
    d_up.copy_(silu.mul_(grad))
    return d_both, d_weights


def swiglu_quantize_triton(
    both: torch.Tensor | Quantized, weights: torch.Tensor | None = None, *, power_of_two: bool = False
) -> Quantized:
    """The Triton kernel: what `swiglu_quantize` runs on a GPU."""
    values = _values(both)
    rows, width = values.shape[0], values.shape[1] // 2
    codes, scales = empty_quantized(values[:, :width], TILES)
    if codes.numel() > 0:
        with torch.cuda.device_of(values):
            quantize_kernel[(rows, -(-scales.shape[1] // QUANTIZED_TILES))](
                values, _scales_of(both), None if weights is None else weights.contiguous(), codes, scales,
                width, values.stride(0), values.stride(1),
                WHOLE=width % TILE == 0, POWER_OF_TWO=power_of_two, TILES=QUANTIZED_TILES, **OPTIONS,
            )  # fmt: skip
    return Quantized(codes, scales, TILES)


def swiglu_backward_triton(
    dy: torch.Tensor, both: torch.Tensor | Quantized, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The Triton kernel: what `swiglu_backward` runs on a GPU."""
    values = _values(both)
    rows, width = dy.shape
    d_both = torch.empty(values.shape, dtype=dy.dtype, device=dy.device)
    d_weights = None if weights is None else torch.empty(rows, dtype=weights.dtype, device=dy.device)
    if rows > 0:
        with torch.cuda.device_of(dy):
            backward_kernel[(rows,)](
                dy, values, _scales_of(both), None if weights is None else weights.contiguous(),
                d_both, d_weights, width, dy.stride(0), dy.stride(1), values.stride(0), values.stride(1),
                WHOLE=width % TILE == 0, **OPTIONS,
            )  # fmt: skip
    return d_both, d_weights


def _values(both: torch.Tensor | Quantized) -> torch.Tensor:
    return both.codes if isinstance(both, Quantized) else both


def _scales_of(both: torch.Tensor | Quantized) -> torch.Tensor | None:
    return both.scales if isinstance(both, Quantized) else None


def _halves(both: torch.Tensor | Quantized) -> tuple[torch.Tensor, ...]:
    """Gates and ups [rows, F] in FP32."""
    return (dequantize(both) if isinstance(both, Quantized) else both.float()).chunk(2, dim=1)


def _sigmoids(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sigmoid(gate) and sigmoid(-gate)."""
    sigmoid = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    complement = torch.empty_like(sigmoid)
    # Band by band the many steps stay within the processor's cache: twice as fast on a CPU.
    band = max(1, BAND_VALUES // max(1, gate.shape[1]))
    for start in range(0, gate.shape[0], band):
        at = slice(start, start + band)
        sigmoid[at], complement[at] = sigmoids(gate[at])
    return sigmoid, complement


def _check(function: str, both: torch.Tensor | Quantized, weights: torch.Tensor | None) -> None:
    if len(both.shape) != 2 or both.shape[1] % 2 != 0:
        raise ValueError(f"{function}: both has shape {tuple(both.shape)}; pass [rows, 2F], the gates first")
    if isinstance(both, Quantized):
        if both.block != TILES:
            raise ValueError(f"{function}: both is quantised in blocks of {both.block}; use quantize_tiles")
    else:
        check_values(function, "both", both, both, "both")
    if weights is not None:
        if tuple(weights.shape) != (both.shape[0],):
            raise ValueError(
                f"{function}: weights have shape {tuple(weights.shape)}; both {tuple(both.shape)} "
                f"needs {(both.shape[0],)}"
            )
        check_values(function, "weights", weights, _values(both), "both")


@jit
def quantize_kernel(
    both, both_scales, weights, codes, scales, width, stride_row, stride_col,
    WHOLE: tl.constexpr, POWER_OF_TWO: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: TILES tiles of one row. `both_scales` and `weights` may be None."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    col = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    gate = _load(both, both_scales, row, tile, 0, width, stride_row, stride_col, WHOLE)
    up = _load(both, both_scales, row, tile, width, width, stride_row, stride_col, WHOLE)
    product = kernel_sigmoids(gate)[0] * gate * up
    if weights is not None:
        product = product * tl.load(weights + row).to(tl.float32)
    scale = kernel_scale(tl.max(magnitude_bits(product), axis=1), POWER_OF_TWO)
    encoded = kernel_encode(product, scale[:, None])
    tl.store(codes + row * width + col, encoded, mask=col < width)
    tiles = tl.cdiv(width, 128)
    tl.store(scales + row * tiles + tile, scale, mask=tile < tiles)


@jit
def backward_kernel(
    dy, both, both_scales, weights, d_both, d_weights, width,
    dy_stride_row, dy_stride_col, stride_row, stride_col,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: one row, eight tiles at a time. `both_scales` may be None, and both of the weights'."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros((8, 128), dtype=tl.float32)
    if weights is not None:
        weight = tl.load(weights + row).to(tl.float32)
    for first in range(0, tl.cdiv(width, 128), 8):
        tile = first + tl.arange(0, 8)
        col = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
        gate = _load(both, both_scales, row, tile, 0, width, stride_row, stride_col, WHOLE)
        up = _load(both, both_scales, row, tile, width, width, stride_row, stride_col, WHOLE)
        grad = _load(dy, None, row, tile, 0, width, dy_stride_row, dy_stride_col, WHOLE)
        sigmoid, complement = kernel_sigmoids(gate)
        silu = gate * sigmoid
        if weights is not None:
            lanes += grad * (silu * up)
            grad = grad * weight
        d_gate = (complement * gate + 1.0) * sigmoid * (grad * up)
        at = d_both + row * 2 * width + col
        tl.store(at, d_gate.to(d_both.dtype.element_ty), mask=col < width)
        tl.store(at + width, (silu * grad).to(d_both.dtype.element_ty), mask=col < width)
    if weights is not None:
        tl.store(d_weights + row, kernel_lane_sum(lanes).to(d_weights.dtype.element_ty))


@jit
def _load(source, source_scales, row, tile, offset, width, stride_row, stride_col, WHOLE: tl.constexpr):
    """FP32 values [tiles, 128] of `width` columns from `offset` on, zero past the last. With scales: FP8."""
    col = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = col < width
    at = (offset + col).to(tl.int64) * stride_col
    values = tl.load(source + row * stride_row + at, mask=inside, other=0.0).to(tl.float32)
    if source_scales is not None:
        row_scales = source_scales + row * tl.cdiv(2 * width, 128)
        if WHOLE:  # then tiles of the input are tiles of the output
            scale = tl.load(row_scales + offset // 128 + tile, mask=tile * 128 < width, other=1.0)
            values = values * scale[:, None]
        else:
            values = values * tl.load(row_scales + (offset + col) // 128, mask=inside, other=1.0)
    return values
