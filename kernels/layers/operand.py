"""What an FP8 layer reads: its weight, with all that the caller said about it, and its input."""

from __future__ import annotations

import torch

from kernels.formats.grouped_quantize import QuantizedExperts
from kernels.formats.quantize import Quantized
from kernels.layers.activation import FP8Activation
from kernels.layers.weight import FP8Weight, quantize_weight
from kernels.layers.wgrad import MainGrad, WgradQueue, WgradTarget


class FP8Operand:
    """A weight as a layer reads it: its blocks both ways, and where its gradient goes."""

    def __init__(
        self,
        function: str,
        weight: torch.Tensor,
        copy: FP8Weight | None,
        main_grad: MainGrad | None,
        queue: WgradQueue | None,
        power_of_two: bool,
        weight_power_of_two: bool | None = None,
    ) -> None:
        if copy is not None and copy.shape != weight.shape:
            raise ValueError(
                f"{function}: copy is of a weight {tuple(copy.shape)} and weight is {tuple(weight.shape)}"
            )
        self.copy, self.power_of_two = copy, power_of_two
        self._weight_power_of_two = power_of_two if weight_power_of_two is None else weight_power_of_two
        self.target = WgradTarget(weight, main_grad, queue)

    def blocks(self, weight: torch.Tensor) -> Quantized | QuantizedExperts:
        """For fprop."""
        if self.copy is not None:
            return self.copy.blocks()
        return quantize_weight(weight, power_of_two=self._weight_power_of_two)

    def transposed(self, weight: torch.Tensor | None) -> Quantized | QuantizedExperts:
        """For dgrad; `weight` is None where a copy is there."""
        if self.copy is not None:
            return self.copy.transposed()
        return quantize_weight(weight, power_of_two=self._weight_power_of_two).transpose()

    def kept(self, weight: torch.Tensor, needed: bool) -> torch.Tensor | None:
        """What `transposed` will want: saved through autograd, which sees that nobody writes it."""
        return weight if needed and self.copy is None else None


def values_and_tiles(x: torch.Tensor | FP8Activation) -> tuple[torch.Tensor, Quantized | None, bool]:
    """The matrix [rows, in] that takes the gradient of x, the tiles of x if there are any, and whether their
    scales are known to be powers of two."""
    if isinstance(x, FP8Activation):
        return x.anchor.reshape(-1, x.shape[-1]), x.tiles, x.power_of_two
    return x.reshape(-1, x.shape[-1]), None, False
