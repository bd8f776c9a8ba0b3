"""How the next token is chosen. Each request draws from its own stream of random numbers.

The draw at a position is a hash of the request's seed and that position: it does not depend on what else is
in the batch, on the order in which requests finish, or on whether tokens were drafted.
Legend: B rows, O vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.engine.errors import SamplingError


@dataclass(frozen=True)
class Sampling:
    """One request's rules. `temperature` 0 is greedy. Of the tempered distribution the `top_k` likeliest
    tokens stay (0: all), of those the smallest set that holds `top_p` of their mass, and of those what is at
    least `min_p` times as likely as the likeliest. Raises SamplingError naming the field."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """Strings that end the answer when its text comes to contain one of them."""
    seed: int = 0
    """Which stream of random numbers the request draws from."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SamplingError(f"sampling.max_tokens is {self.max_tokens}: ask for at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(
                f"sampling.temperature is {self.temperature}: it must be 0 (greedy) or more, and finite"
            )
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"sampling.top_p is {self.top_p}: it must be in (0, 1]")
        if not 0 <= self.top_k < 1 << 31:
            raise SamplingError(
                f"sampling.top_k is {self.top_k}: it must be 0 (all tokens) or more, in 31 bits"
            )
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"sampling.min_p is {self.min_p}: it must be in [0, 1]")
        if any(not text for text in self.stop):
            raise SamplingError("sampling.stop holds an empty string, which would end every answer at once")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise SamplingError(f"sampling.seed is {self.seed}: it must fit 64 bits")


@dataclass
class Rules:
    """The sampling rules of a batch's rows as tensors [B]."""

    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    min_p_B: Tensor
    seeds_B: Tensor
    greedy: bool
    """Every row is greedy."""
    filtered: Tensor | None
    """Which rows leave tokens out, int64; None when no row does."""

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device | str = "cpu") -> Rules:
        def tensor(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        filtered = [
            i for i, r in enumerate(rows) if r.temperature > 0 and (r.top_p < 1 or r.top_k or r.min_p)
        ]
        return cls(
            tensor([r.temperature for r in rows], torch.float64),
            tensor([r.top_p for r in rows], torch.float64),
            tensor([r.top_k for r in rows], torch.int64),
            tensor([r.min_p for r in rows], torch.float64),
            tensor([r.seed for r in rows], torch.int64),
            all(r.temperature == 0 for r in rows),
            torch.tensor(filtered, device=device) if filtered else None,
        )

    def draws(self, made: Sequence[int]) -> Tensor:
        """Each row's number for its next token, when it has made so many: float64 [B]."""
        made_B = torch.tensor(made, device=self.seeds_B.device)
        return made_B.double() if self.greedy else uniforms(self.seeds_B, made_B)


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


def choose(logits_BO: Tensor, rules: Rules, draws_B: Tensor) -> Tensor:
    """The next token of every row, int64 [B], by inverting its cumulative distribution at `draws_B`.

    Every operation works on a row by itself.
    """
    best_B = logits_BO.argmax(-1)
    if rules.greedy:
        return best_B
    greedy_B = rules.temperature_B == 0
    temperature_B1 = torch.where(greedy_B, 1.0, rules.temperature_B)[:, None]
    # From the best one down, so that no temperature is too small to divide by.
    below_BO = logits_BO.double() - logits_BO.amax(-1, keepdim=True)
    probs_BO = torch.softmax(below_BO / temperature_B1, -1)
    if rules.filtered is not None:
        probs_BO[rules.filtered] = _filtered(probs_BO[rules.filtered], rules)
    cumulative = probs_BO.cumsum(-1)
    target = draws_B[:, None] * cumulative[:, -1:]
    drawn_B = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=probs_BO.shape[1] - 1)
    return torch.where(greedy_B, best_B, drawn_B)


def _filtered(probs_BO: Tensor, rules: Rules) -> Tensor:
    """Probabilities with what top_k, top_p and min_p leave out set to zero; the likeliest token stays."""
    top_p, top_k, min_p = (
        rule[rules.filtered, None] for rule in (rules.top_p_B, rules.top_k_B, rules.min_p_B)
    )
    ordered, order = probs_BO.sort(dim=-1, descending=True, stable=True)
    rank_O = torch.arange(probs_BO.shape[1], device=probs_BO.device)
    dropped = (rank_O >= top_k) & (top_k > 0)
    ordered = ordered.masked_fill(dropped, 0.0)
    before = ordered.cumsum(-1) - ordered
    # At top_p 1 nothing goes, whatever the rounding of the sum.
    dropped |= (before >= top_p * ordered.sum(-1, keepdim=True)) & (top_p < 1)
    dropped |= ordered < min_p * ordered[:, :1]
    dropped[:, 0] = False
    return probs_BO.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), 0.0)
