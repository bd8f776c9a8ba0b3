"""Precision policies: in what format the large matrix products run (report §3.3).

One policy is chosen when a model is built. Embedding, head, gate, norms and attention stay in high precision
under every policy; only the Linear layers inside blocks go through it. Under `fp8` whole SwiGLU networks run
as one operator, since their activations wait in FP8 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from kernels.layers.activation import FP8Activation
    from kernels.layers.weight import FP8Weights
    from kernels.layers.wgrad import MainGrad

NAMES = ("fp32", "bf16", "fp8")


@dataclass
class Precision:
    """`fp32`: as stored. `bf16`: operands cast to bfloat16. `fp8`: E4M3 tiles and blocks with FP32 promotion,
    emulated with the same rounding where there is no GPU."""

    name: str = "fp32"
    power_of_two: bool = False
    """Round the scales of `fp8` up to powers of two. A model is built without; experiments set it."""
    copies: FP8Weights | None = field(default=None, init=False, repr=False, compare=False)
    """FP8 weights of the present optimizer step: see `steady_weights`."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"precision {self.name!r} is unknown: choose one of {', '.join(NAMES)}")

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or in a file: a model that is copied during a step is outside of that step."""
        return self.__dict__ | {"copies": None}

    @property
    def fp8(self) -> bool:
        return self.name == "fp8"

    def linear(self, x: Tensor | FP8Activation, weight: Tensor, *, e5m6: bool = False) -> Tensor:
        """x [..., in] times weight [out, in] transposed -> [..., out], in x's type.

        Under `fp8`, x may be an `operand`; `e5m6` keeps it in that format for the backward pass.
        """
        if self.name == "fp32":
            return F.linear(x, weight)
        if self.name == "bf16":
            return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
        from kernels.layers.linear import fp8_linear

        copy, main_grad = self._step(weight)
        return fp8_linear(
            x, weight, power_of_two=self.power_of_two, e5m6=e5m6, copy=copy, main_grad=main_grad
        )

    def operand(self, x: Tensor, *, power_of_two: bool = False) -> Tensor | FP8Activation:
        """x as several products may read it: under `fp8` quantised once, else as it is."""
        if not self.fp8:
            return x
        from kernels.layers.activation import fp8_activation

        return fp8_activation(x, power_of_two=power_of_two or self.power_of_two)

    def fp8_mlp(self, x: Tensor | FP8Activation, gate_up: Tensor, down: Tensor) -> Tensor:
        """A SwiGLU network [..., D] -> [..., D] under `fp8`: gate_up [2F, D], down [D, F]."""
        from kernels.layers.mlp import fp8_mlp

        return fp8_mlp(x, gate_up, down, power_of_two=self.power_of_two, **self._steps(gate_up, down))

    def fp8_experts(
        self,
        x: Tensor | FP8Activation,
        gate_up: Tensor,
        down: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        """The networks of all experts on rows sorted by expert, under `fp8`: see `kernels.layers.mlp`.

        What is sent to experts and back has power-of-two scales (§3.3.3).
        """
        from kernels.layers.mlp import fp8_experts

        scales = {"power_of_two": True, "weight_power_of_two": self.power_of_two}
        return fp8_experts(x, gate_up, down, offsets, weights, **scales, **self._steps(gate_up, down))

    def _steps(self, *weights: Tensor) -> dict[str, Any]:
        """`_step` of several weights, as options of a network."""
        copies, main_grads = zip(*(self._step(weight) for weight in weights), strict=True)
        return {
            "copies": None if None in copies else copies,
            "main_grads": None if any(grad is None for grad in main_grads) else main_grads,
        }

    def _step(self, weight: Tensor) -> tuple[Any, MainGrad | None]:
        """Inside `steady_weights`: the weight in FP8, and its gradient as the buffer that products add to."""
        if self.copies is None:
            return None, None
        main_grad = None
        if (
            torch.is_grad_enabled()
            and weight.requires_grad
            and weight.is_leaf
            and weight.dtype == torch.float32
        ):
            # Asked for in the backward pass: between the two `zero_grad` may put away what is there now.
            main_grad = partial(_gradient_of, weight)
        return self.copies.of(weight), main_grad

    @property
    def activation_dtype(self) -> torch.dtype:
        """Type of the residual stream."""
        return torch.float32 if self.name == "fp32" else torch.bfloat16


def _gradient_of(weight: Tensor) -> Tensor:
    """`weight.grad`, made of zeros where there is none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    return weight.grad


@contextmanager
def steady_weights(policies: Iterable[Precision]) -> Iterator[None]:
    """Around the micro-batches of one optimizer step, forward and backward: nobody writes weights inside.

    Under `fp8` each weight is quantised once for all of them, and gradients of weights are added to `.grad`
    by the products that make them. Policies of replicas, whose weights are the same memory, share the copies.
    Inside another such scope, as an evaluation may be, it has copies of its own; then the other's come back.
    """
    policies = [policy for policy in policies if policy.fp8]
    if not policies:
        yield
        return
    from kernels.layers.weight import FP8Weights

    outer = [policy.copies for policy in policies]
    with FP8Weights(power_of_two=policies[0].power_of_two) as copies:
        for policy in policies:
            policy.copies = copies
        try:
            yield
        finally:
            for policy, other in zip(policies, outer, strict=True):
                policy.copies = other
