"""FP8 copies of weights, made once for all micro-batches of an optimizer step.

A copy that outlives a write to its weight would train on old values, without a sign of it. Torch's count of
writes does not help: fused optimizers do not raise it on a CPU. So copies live in a scope that the caller
puts around the micro-batches of a step, and that ends before the optimizer writes:

    with FP8Weights() as copies:
        for batch in micro_batches:
            y = fp8_linear(batch, weight, copy=copies.of(weight))
            ...
    optimizer.step()

A copy that is used after its scope is an error. And a write inside the scope is an error too: at the latest
when the scope ends, which compares values of every weight with what they were.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch

from kernels.formats.grouped_quantize import QuantizedExperts, quantize_experts, quantize_experts_both
from kernels.formats.quantize import Quantized, quantize_blocks
from kernels.formats.transpose import quantize_blocks_both

SAMPLED = 256  # values of a weight that are compared when a scope ends


def quantize_weight(weight: torch.Tensor, *, power_of_two: bool = False) -> Quantized | QuantizedExperts:
    """128x128 blocks of one weight [out, in], or of the weights [experts, out, in] of all experts."""
    return (quantize_blocks if weight.dim() == 2 else quantize_experts)(weight, power_of_two=power_of_two)


class FP8Weight:
    """The blocks of one weight and of its transpose, made in one pass when the backward pass will need both.

    Made by `FP8Weights.of`, which says how long it may be used.
    """

    def __init__(self, weight: torch.Tensor, power_of_two: bool, both: bool) -> None:
        weight = weight.detach()
        self.shape = weight.shape
        self._weight, self._version = weight, weight._version
        self._sample = _sample(weight)
        self._transposed: Quantized | QuantizedExperts | None = None
        self._blocks: Quantized | QuantizedExperts | None
        if both:
            make = quantize_blocks_both if weight.dim() == 2 else quantize_experts_both
            self._blocks, self._transposed = make(weight, power_of_two=power_of_two)
        else:
            self._blocks = quantize_weight(weight, power_of_two=power_of_two)

    def blocks(self) -> Quantized | QuantizedExperts:
        """128x128 blocks of the weight, for fprop.

        Raises:
            RuntimeError: the scope has ended, or the weight was written since.
        """
        if self._blocks is None:
            raise RuntimeError(
                f"FP8Weight: the FP8 copy of a weight {tuple(self.shape)} is used after its scope; run "
                "forward and backward passes inside one `with FP8Weights()`, once a step"
            )
        if self._weight._version != self._version:
            raise RuntimeError(self._written())
        return self._blocks

    def transposed(self) -> Quantized | QuantizedExperts:
        """128x128 blocks of the transposed weight, for dgrad. Raises as `blocks` does."""
        blocks = self.blocks()
        if self._transposed is None:
            self._transposed = blocks.transpose()
        return self._transposed

    def _written(self) -> str:
        return (
            f"FP8Weight: a weight {tuple(self.shape)} was written while its FP8 copy was in use; step the "
            "optimizer and load weights outside of `with FP8Weights()`"
        )


class FP8Weights:
    """The scope of FP8 copies: see the head of this file. Threads may share it; each weight is made once."""

    def __init__(self, *, power_of_two: bool = False) -> None:
        self._power_of_two = power_of_two
        self._copies: dict[tuple[object, ...], FP8Weight] = {}
        self._lock = threading.Lock()
        self._open = True

    def of(self, weight: torch.Tensor) -> FP8Weight:
        """The copy of a weight [out, in] or [experts, out, in], FP32 or BF16. Tensors over the same memory
        share it. Where gradients are enabled, blocks of the transpose are made in the same pass.

        Raises:
            RuntimeError: the scope has ended.
            TypeError, ValueError: `weight` is no such tensor.
        """
        if weight.dim() not in (2, 3):
            raise ValueError(
                f"FP8Weights.of: the weight has shape {tuple(weight.shape)}; "
                "pass [out, in] or [experts, out, in]"
            )
        # An address means one weight only while somebody holds it: a copy holds its own.
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device)
        with self._lock:
            if not self._open:
                raise RuntimeError("FP8Weights.of: the scope has ended; open a new one for every step")
            if key not in self._copies:
                self._copies[key] = FP8Weight(weight, self._power_of_two, torch.is_grad_enabled())
            return self._copies[key]

    def __enter__(self) -> FP8Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._open = False
            copies = list(self._copies.values())
            self._copies.clear()
        written = [] if kind is not None else _written(copies)
        for copy in copies:
            copy._blocks = copy._transposed = None
        if written:
            raise RuntimeError(written[0]._written())


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Some values of a weight, as bits: NaN must compare equal to itself."""
    values = weight.reshape(-1)[:: max(1, weight.numel() // SAMPLED)].float()
    return values.clone().view(torch.int32)


def _written(copies: list[FP8Weight]) -> list[FP8Weight]:
    """Those whose weight is not what it was. A GPU is waited for once."""
    by_device: dict[torch.device, list[FP8Weight]] = {}
    for copy in copies:
        by_device.setdefault(copy._weight.device, []).append(copy)
    found = []
    for group in by_device.values():
        changed = torch.stack([(copy._sample != _sample(copy._weight)).any() for copy in group])
        found += [copy for copy, written in zip(group, changed.tolist(), strict=True) if written]
    return found
