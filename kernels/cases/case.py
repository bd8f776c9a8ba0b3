"""What one compiled case of a kernel is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: what Triton's launcher would compile for such arguments.

    `types` gives every argument in order; "1" is an integer known to be 1 (a unit stride). Arguments of
    `aligned` are known to be multiples of 16, as the launcher finds them for usual sizes. A kernel that
    is not `exact` uses the hardware's exp and log, which are approximate. A kernel of the FP8 `tensor_core`
    spells out this many `products` of 128 along K, of operands that `tma` brings; one of the
    `bf16_tensor_core` multiplies BF16. One in `gluon` is made by another front end of the compiler.
    Each of `ones` is a size that may be 1: the launcher compiles a kernel anew for that.
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
    bf16_tensor_core: bool = False
    gluon: bool = False
    exact: bool = True
    ones: tuple[str, ...] = ()

    def with_ones(self) -> Iterator[Case]:
        """This case with each of `ones` equal to 1, where the kernel is specialised to it."""
        never = {one.name for one in getattr(self.kernel, "params", ()) if one.do_not_specialize}
        for size in self.ones:
            if size not in never:
                yield replace(
                    self,
                    name=f"{self.name}, {size} = 1",
                    types={**self.types, size: "1"},
                    aligned=tuple(name for name in self.aligned if name != size),
                    ones=(),
                )
