"""Casts of Triton's CPU interpreter as the hardware does them, for scripts that run under TRITON_INTERPRET=1.

The interpreter's own casts to E4M3 and BF16 lose the carry into the exponent and do not saturate. With these
in their place, codes of interpreted kernels can be compared bit for bit.
"""

from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """`interpreter._convert_float` by torch: to nearest even, E4M3 saturates and has one NaN, 0x7F."""
    bits = np.ascontiguousarray(values).view(f"int{source.primitive_bitwidth}")
    number = torch.from_numpy(bits.copy()).view(TYPES[source])
    if target == tl.float8e4nv:
        number = number.float().clamp(-448, 448)
    kind = f"int{target.primitive_bitwidth}"
    found = number.to(TYPES[target]).view(getattr(torch, kind)).numpy()
    if target == tl.float8e4nv:
        found = np.where(found & 0x7F == 0x7F, np.int8(0x7F), found)
    return found.view("u" + kind).reshape(values.shape)


def exact_casts() -> Any:
    """A context in which interpreted kernels cast like the hardware."""
    return mock.patch.object(interpreter, "_convert_float", convert)
