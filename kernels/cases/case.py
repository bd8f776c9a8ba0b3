"""What one compiled case of a kernel is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: what Triton's launcher would compile for such arguments.

    `types` gives every argument in order; "1" is an integer known to be 1 (a unit stride). Arguments of
    `aligned` are known to be multiples of 16, as the launcher finds them for usual sizes. A kernel that
    is not `exact` uses the hardware's exp and log, which are approximate. Hopper's tensor-core instructions
    are expected of FP8 with `tensor_core`, of BF16 with `bf16_tensor_core`.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]
    tensor_core: bool = False
    bf16_tensor_core: bool = False
    exact: bool = True
