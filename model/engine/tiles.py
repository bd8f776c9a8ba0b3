"""Batch invariance: the same bits for a row whatever else is in the batch.

A matrix product rounds in an order that depends on its shape, so a row's result depends on how many rows it
is computed with. In the invariant mode every operator that sums or approximates runs on tiles of a fixed
number of rows, padded with zeros: the shape never changes, and with it the order of every sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16
"""Rows of a tile: enough that a vector register is filled whatever the width, few enough for one request."""


def padded(rows: Tensor) -> Tensor:
    """The rows with zeros after them up to whole tiles."""
    return F.pad(rows, (*([0, 0] * (rows.dim() - 1)), 0, -rows.shape[0] % TILE))


def tiled(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """`function(*rows)` computed tile by tile; arguments and results are [rows, ...]."""
    count = rows[0].shape[0]
    whole = [padded(r) for r in rows]
    parts = [function(*(r[i : i + TILE] for r in whole)) for i in range(0, whole[0].shape[0], TILE)]
    return tuple(torch.cat(part)[:count] for part in zip(*parts, strict=True))
