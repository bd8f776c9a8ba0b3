"""BF16 products on a CPU that has no BF16 arithmetic, as a tensor core makes them.

There torch falls back to code that is 2 to 30 times as slow as FP32. Products of two BF16 numbers are exact
in FP32, so an FP32 product of the widened matrices, rounded to BF16 once at its end, is what a BF16 product
with an FP32 accumulator is, up to the order of its sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.mm.out,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class WideProducts(TorchDispatchMode):
    """While active, matrix products and attention over BF16 tensors run in FP32 and round their result."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        args = tuple(_wide(a) for a in args)
        if (out := kwargs.get("out")) is not None:
            return out.copy_(aten.mm.default(*args))
        found = func(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            return found.bfloat16()
        # Attention's second output is the logarithm of its sums, FP32 for BF16 operands too.
        forward = func is aten._scaled_dot_product_flash_attention_for_cpu.default
        return (found[0].bfloat16(), found[1]) if forward else tuple(t.bfloat16() for t in found)


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    return value.float() if narrow else value
