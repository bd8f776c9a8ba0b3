"""Recomputing cheap activations in the backward pass instead of keeping them (report §3.2.3).

The outputs of RMSNorm, of SwiGLU's product and of MLA's up-projections are large and cheap to make from
smaller tensors that the backward pass keeps anyway. Inside `recomputing()`, the code that makes such an
output calls `remember(output, make)`; whatever operator then saves that output for its backward pass saves
`make` in its place, and the first one to need it calls `make` for all. The same operators run on the same
inputs, so no bit changes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Recipe:
    """How to make one tensor again; the result is shared while anyone holds it."""

    def __init__(self, output: Tensor, make: Callable[[], Tensor]) -> None:
        self.output = weakref.ref(output)
        self.make = make
        self.made: weakref.ref[Tensor] | None = None

    def again(self) -> Tensor:
        made = self.made() if self.made is not None else None
        if made is None:
            with torch.no_grad():
                made = self.make()
            self.made = weakref.ref(made)
        return made


class _Recipes(threading.local):
    def __init__(self) -> None:
        self.active = False
        # By address of the storage; an entry counts only while its tensor lives, since addresses are used
        # again.
        self.by_address: dict[int, _Recipe] = {}


_recipes = _Recipes()


def remember(output: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Say that `make()` gives `output` again, bit for bit and without gradients; returns `output`.

    `make` keeps its inputs alive, so it should read nothing that the backward pass would not keep anyway.
    Outside `recomputing()` this does nothing.
    """
    if _recipes.active and output.requires_grad and output.numel():
        _recipes.by_address[output.untyped_storage().data_ptr()] = _Recipe(output, make)
    return output


@contextmanager
def recomputing(on: bool = True) -> Iterator[None]:
    """Operators inside save recipes for what was remembered. Of this thread alone, as micro-batches run in
    threads."""
    if not on:
        yield
        return
    if _recipes.active:
        raise RuntimeError("recomputing() is not meant to be nested")
    _recipes.active = True
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _recipes.active = False
        _recipes.by_address.clear()


def _pack(tensor: Tensor) -> Any:
    recipe = _recipes.by_address.get(tensor.untyped_storage().data_ptr())
    output = recipe.output() if recipe is not None else None
    if (
        recipe is None
        or output is None
        or output.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    ):
        return tensor
    return recipe, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, dtype, shape, stride, offset = packed
    made = recipe.again()
    if made.dtype != dtype:
        raise RuntimeError(f"a recomputed tensor is {made.dtype} where {dtype} was saved")
    return made.as_strided(shape, stride, offset)
