"""Precision policies: in what format the large matrix products run (report §3.3).

One policy is chosen when a model is built. Embedding, head, gate, norms and attention stay in high precision
under every policy; only the Linear layers inside blocks go through `Precision.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("fp32", "bf16", "fp8")


@dataclass(frozen=True)
class Precision:
    """`fp32`: as stored. `bf16`: operands cast to bfloat16. `fp8`: E4M3 tiles and blocks with FP32 promotion,
    emulated with the same rounding where there is no GPU."""

    name: str = "fp32"
    power_of_two: bool = False
    """Round the scales of `fp8` up to powers of two. A model is built without; experiments set it."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"precision {self.name!r} is unknown: choose one of {', '.join(NAMES)}")

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., in] times weight [out, in] transposed -> [..., out], in x's type."""
        if self.name == "fp32":
            return F.linear(x, weight)
        if self.name == "bf16":
            return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
        from kernels.linear import fp8_linear

        return fp8_linear(x, weight, power_of_two=self.power_of_two).to(x.dtype)

    @property
    def activation_dtype(self) -> torch.dtype:
        """Type of the residual stream."""
        return torch.float32 if self.name == "fp32" else torch.bfloat16
