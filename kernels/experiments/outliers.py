"""What outliers of an activation cost under coarse and fine scales (DeepSeek-V3 report, section 3.3.2).

An activation of 256 tokens and 2048 channels gets four outliers, each in a token and a tile of its own, and
is quantised to E4M3 with one scale for the tensor, for each token, or for each 1x128 tile; the weight of the
GEMM is always in 128x128 blocks. E4M3 is a floating-point format: a larger scale costs a value nothing until
it falls below the smallest normal number (largest / 28,672), then its last bits, and at last the whole value
(below largest / 458,752). So values that lie close together bear large outliers, and values that are spread
widely do not. Both are shown:

    normal   standard normal
    wide     standard normal times 2**(3 n), n standard normal: magnitudes over many powers of two
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.figures import Row
from kernels.formats.quantize import E4M3_MAX, TILE, dequantize, quantize_blocks
from kernels.metrics import relative_error

TOKENS, CHANNELS, OUTPUTS = 256, 2048, 256
OUTLIERS = ((17, 100), (80, 700), (150, 1300), (222, 1900))
"""Where they are: token, channel."""
SIZES = (1, 10, 100, 1_000, 10_000, 100_000)
"""How large they are, in standard deviations of the other values."""
DATA = ("normal", "wide")
SCALES = ("tensor", "token", "tile")
ROUNDING = 2.0**-4
"""Largest relative error of a value that E4M3 holds as a normal number."""


@dataclass(frozen=True)
class Loss:
    """What one outlier size costs under one kind of scale. Outliers themselves are not counted."""

    data: str
    size: float
    scales: str
    flushed: float
    """Share of values that become zero."""
    damaged: float
    """Share of values with a relative error that no normal number of E4M3 has, flushed ones among them."""
    error: float
    """Mean relative error of a value."""
    gemm: float
    """Relative error of the GEMM over the tokens without an outlier."""
    gemm_outliers: float
    """... and over the tokens with one, whose own products are left out of the sums."""


def measure(sizes: Sequence[float] = SIZES, seed: int = 0) -> list[Loss]:
    """Every kind of data, outlier size and scale."""
    losses = []
    weight = torch.randn(OUTPUTS, CHANNELS, generator=torch.Generator().manual_seed(seed + 1))
    weight = dequantize(quantize_blocks(weight)).double()
    for data in DATA:
        x = activation(data, seed)
        deviation = float(x.std())
        apart = torch.zeros_like(x, dtype=torch.bool)
        apart[tuple(torch.tensor(OUTLIERS).t())] = True
        for size in sizes:
            with_outliers = x.masked_fill(apart, size * deviation)
            for scales in SCALES:
                others, rounded = (
                    values.masked_fill(apart, 0)
                    for values in (with_outliers, quantized(with_outliers, scales))
                )
                losses.append(_loss(data, size, scales, others, rounded, weight))
    return losses


def _loss(data: str, size: float, scales: str, x: Tensor, rounded: Tensor, weight: Tensor) -> Loss:
    counted = x != 0
    errors = (rounded - x)[counted].abs() / x[counted].abs()
    out, exact = rounded.double() @ weight.t(), x.double() @ weight.t()
    hit = torch.zeros(len(x), dtype=torch.bool)
    hit[[token for token, _ in OUTLIERS]] = True
    return Loss(
        data,
        size,
        scales,
        flushed=float((rounded[counted] == 0).double().mean()),
        damaged=float((errors > ROUNDING * (1 + 1e-6)).double().mean()),
        error=float(errors.double().mean()),
        gemm=relative_error(out[~hit], exact[~hit]),
        gemm_outliers=relative_error(out[hit], exact[hit]),
    )


def activation(data: str, seed: int) -> Tensor:
    """FP32 [TOKENS, CHANNELS] before it gets outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, CHANNELS, generator=generator)
    if data == "wide":
        x *= torch.exp2(3 * torch.randn(TOKENS, CHANNELS, generator=generator))
    return x


def quantized(x: Tensor, scales: str) -> Tensor:
    """The matrix after E4M3 with one scale for the `tensor`, each `token`, or each `tile` of 128 channels.

    Raises:
        ValueError: `scales` is none of these, or the channels are no whole tiles.
    """
    if scales not in SCALES:
        raise ValueError(f"quantized: scales is {scales!r}; choose one of {', '.join(SCALES)}")
    if x.shape[-1] % TILE:
        raise ValueError(f"quantized: x has {x.shape[-1]} channels; pass a multiple of {TILE}")
    tiles = x.unflatten(-1, (-1, TILE))
    over = {"tensor": (0, 1, 2), "token": (1, 2), "tile": (2,)}[scales]
    scale = tiles.abs().amax(over, keepdim=True) / E4M3_MAX
    codes = (tiles / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2)


def rows(losses: Sequence[Loss]) -> list[Row]:
    """The figures, as percentages."""
    found = []
    for loss in losses:
        label = f"{loss.data}, outliers {loss.size:g}x, a scale a {loss.scales}"
        for what, value in (
            ("values flushed to zero", loss.flushed),
            ("values beyond E4M3's own rounding", loss.damaged),
            ("mean relative error of a value", loss.error),
            ("GEMM error, tokens without outlier", loss.gemm),
            ("GEMM error, tokens with one", loss.gemm_outliers),
        ):
            found.append(Row(f"{label}: {what}", "%", 100 * value))
    return found


def plot(losses: Sequence[Loss], file: Path) -> None:
    """Damaged values, and the mean relative error of a value, over the size of the outliers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, len(DATA), sharex=True, sharey="row", squeeze=False)
    for column, data in enumerate(DATA):
        for scales in SCALES:
            line = [loss for loss in losses if (loss.data, loss.scales) == (data, scales)]
            sizes = [loss.size for loss in line]
            panels[0][column].plot(sizes, [100 * loss.damaged for loss in line], "o-", label=f"a {scales}")
            panels[1][column].plot(sizes, [100 * loss.error for loss in line], "o-")
        panels[0][column].set(title=data, xscale="log", yscale="log")
        panels[1][column].set(xlabel="outliers, standard deviations", yscale="log")
    panels[0][0].set_ylabel("% of values beyond\nE4M3's own rounding")
    panels[1][0].set_ylabel("% mean relative\nerror of a value")
    panels[0][0].legend(title="one scale for")
    figure.savefig(file, dpi=110)
