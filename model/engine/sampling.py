"""How the next token is chosen. Each request draws from its own stream of random numbers.

The draw at a position is a hash of the request's seed and that position, so a request gives the same text
whatever else is in the batch and in whatever order requests finish.
Legend: B rows, O vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. `top_p` 1 keeps the whole distribution."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens is {self.max_tokens}: ask for at least one token")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature is {self.temperature}: it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}: it must be in (0, 1]")


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (wrapping); logical shifts are made of arithmetic ones and a mask."""

    def shifted(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return x ^ shifted(x, 31)


def uniforms(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """One number in [0, 1) a row, float64 [B], a function of (seed, position) alone."""
    mixed = _mix(_mix(seeds_B * -7046029254386353131) + positions_B * -7046029254386353131 + 1)
    return ((mixed >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def choose(logits_BO: Tensor, temperature: float, top_p: float, draws_B: Tensor) -> Tensor:
    """The next token of every row, int64 [B], by inverting the cumulative distribution at `draws_B`."""
    if temperature == 0:
        return logits_BO.argmax(-1)
    probs_BO = torch.softmax(logits_BO.double() / temperature, -1)
    if top_p < 1:
        ordered, order = probs_BO.sort(-1, descending=True)
        # A token stays while the mass before it is below top_p, so at least one always stays.
        dropped = (ordered.cumsum(-1) - ordered) >= top_p
        probs_BO = probs_BO.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), 0.0)
    cumulative = probs_BO.cumsum(-1)
    target = draws_B[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=probs_BO.shape[1] - 1)
