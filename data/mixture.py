"""How much of each source goes into a token budget, and which of its documents.

The budget is shared out by weight. A source with more than its share gives a random sample of whole
documents; one with less is gone through again, in another order each time, and how often is reported:
repeated data teaches less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.hashing import generator
from infra.errors import ConfigError
from infra.errors import nearest as nearest_names


@dataclass(frozen=True)
class Draw:
    """What one source gives."""

    documents: np.ndarray  # [drawn] int64: which documents, in order, repeated if need be
    available: int  # documents there were

    @property
    def epochs(self) -> float:
        """How often the source was gone through."""
        return len(self.documents) / max(1, self.available)


def shares(weights: Mapping[str, float], present: Sequence[str], budget: int) -> dict[str, int]:
    """Tokens for each name with a weight, in proportion. Raises ConfigError for names that are not
    present."""
    for name, weight in weights.items():
        if name not in present:
            raise ConfigError(
                f"mixture: there is no {name!r} among the inputs; {nearest_names(name, present)}"
            )
        if weight < 0:
            raise ConfigError(f"mixture.{name}: a weight cannot be negative ({weight})")
    total = sum(weights.values())
    if total <= 0:
        raise ConfigError(f"mixture: give at least one of {', '.join(sorted(present))} a weight above 0")
    return {name: round(budget * weight / total) for name, weight in sorted(weights.items()) if weight > 0}


def order(name: str, count: int, epoch: int, seed: int) -> np.ndarray:
    """In which order epoch `epoch` goes through the documents of a source (numbered by their sorted ids)."""
    return generator("mixture", seed, name, epoch).permutation(count)


def draw(name: str, tokens: np.ndarray, target: int, seed: int) -> Draw:
    """Documents of at least `target` tokens in all, given the tokens (at least 1) of each.

    Whole epochs, then the beginning of another, so that no document is taken twice more than any other. The
    last document passes the target, often by far; `nearest` says how many of its pieces to take.
    """
    if target > 0 and not len(tokens):
        raise ConfigError(f"mixture.{name}: it has a weight but nothing that fits a row")
    picked = [np.empty(0, dtype=np.int64)]
    total = epoch = 0
    while total < target:
        sequence = order(name, len(tokens), epoch, seed)
        sums = total + np.cumsum(tokens[sequence])
        end = min(int(np.searchsorted(sums, target)) + 1, len(sums))
        picked.append(sequence[:end])
        total = int(sums[end - 1])
        epoch += 1
    return Draw(np.concatenate(picked), len(tokens))


def nearest(lengths: np.ndarray, target: int) -> int:
    """How many pieces, from the first, come nearest to `target` tokens; the fewer of two equals."""
    sums = np.concatenate([[0], np.cumsum(lengths)])
    return int(np.argmin(np.abs(sums - target)))
