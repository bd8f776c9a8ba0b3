"""What one compiled case of a kernel is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: what Triton's launcher would compile for such arguments.

    `types` gives every argument in order; "1" is an integer known to be 1 (a unit stride). Arguments of
    `aligned` are known to be multiples of 16, as the launcher finds them for usual sizes. A kernel that
    is not `exact` uses the hardware's exp and log, which are approximate. A kernel of the FP8 `tensor_core`
    spells out this many `products` of 128 along K, of operands that `tma` brings.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]
    tensor_core: bool = False
    products: int = 1
    tma: bool = False
    exact: bool = True
