"""Is a difference between two runs more than noise? The statistics of the comparison.

Training is chaotic: two runs that differ by a rounding end in losses that differ too. So the runs of a seed
in BF16, plain and with noise on their initial weights, are one family. Its spread is what noise does, and a
variant is measured from its mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DECAY = 0.9
"""Of the moving average of training losses (report, appendix B.1)."""


def ema(losses: Sequence[float], decay: float = DECAY) -> list[float]:
    """Exponential moving averages; the first is the first loss."""
    averages = list(losses[:1])
    for loss in losses[1:]:
        averages.append(decay * averages[-1] + (1 - decay) * loss)
    return averages


def curve_difference(losses: Sequence[float], base: Sequence[float]) -> list[float]:
    """Relative difference of two runs' moving averages at every step: the curve of appendix B.1.

    Raises:
        ValueError: the runs have different lengths.
    """
    return [own / other - 1 for own, other in zip(ema(losses), ema(base), strict=True)]


def largest_difference(losses: Sequence[float], base: Sequence[float]) -> float:
    """Largest magnitude of `curve_difference` over the second half of the run, without its first fall."""
    curve = curve_difference(losses, base)
    return max(abs(difference) for difference in curve[len(curve) // 2 :])


@dataclass(frozen=True)
class Comparison:
    """Relative to the mean of each seed's family. NaN where there are too few runs."""

    excess: list[float]
    """Of each seed."""
    mean: float
    error: float
    """Standard error of the mean over seeds."""
    spread: float
    """Standard deviation of a run in its family."""
    band: float
    """Twice the standard error that the mean would have if the variant were one more draw of the noise."""

    @property
    def upper(self) -> float:
        """The mean and twice its standard error."""
        return self.mean + 2 * self.error

    @property
    def inside(self) -> bool:
        """Whether noise alone explains the mean."""
        return abs(self.mean) <= self.band


def compare(values: Mapping[int, float], families: Mapping[int, Sequence[float]]) -> Comparison:
    """`values` of a variant, by seed, against the family of each seed; seeds that miss either are left out.

    Raises:
        ValueError: no seed has both.
    """
    seeds = sorted(seed for seed in values if families.get(seed))
    if not seeds:
        raise ValueError("compare: no seed has a run of the variant and a family; make both first")
    means = {seed: statistics.fmean(families[seed]) for seed in seeds}
    excess = [values[seed] / means[seed] - 1 for seed in seeds]
    squares = sum((value / means[seed] - 1) ** 2 for seed in seeds for value in families[seed])
    freedom = sum(len(families[seed]) - 1 for seed in seeds)
    spread = math.sqrt(squares / freedom) if freedom else math.nan
    # A draw varies by the spread, and the mean of a family of m that it is measured from by spread / sqrt(m).
    variance = sum(1 + 1 / len(families[seed]) for seed in seeds) / len(seeds) ** 2
    return Comparison(
        excess,
        statistics.fmean(excess),
        statistics.stdev(excess) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan,
        spread,
        2 * spread * math.sqrt(variance),
    )
