"""The figures and the plot of a set of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.figures import Row, at_most
from model.precision_study.comparison import compare, curve_difference, ema, largest_difference

BOUND = 0.25
"""Percent: the report's largest relative difference of the loss (appendix B.1)."""
FAMILY = ("bf16", "noise1", "noise2")
LABELS = {
    "fp8": "FP8",
    "fp8_power_of_two": "FP8, scales powers of two",
    "order": "BF16, data in another order",
}
QUANTITIES = ("held-out loss", "training loss")

Run = dict[str, Any]


def rows(runs: Sequence[Run]) -> list[Row]:
    """Every variant against BF16, by held-out loss and by the moving average of the training loss, as soon as
    there is a pair of runs; and what reading weights in FP8 costs, which is free of the noise of training."""
    found = []
    for variant, label in LABELS.items():
        for quantity in QUANTITIES:
            values = _by_seed(runs, (variant,), quantity)
            families = _by_seed(runs, FAMILY, quantity)
            if not set(values) & set(families):
                continue
            result = compare({seed: run[0] for seed, run in values.items()}, families)
            name = f"{label}, {quantity} over BF16's"
            found += [
                Row(
                    f"{name}: mean over {len(result.excess)} seeds",
                    "%",
                    100 * result.mean,
                    published=_bound(variant),
                ),
                Row(f"{name}: largest of a seed", "%", 100 * max(result.excess, key=abs)),
            ]
            # Without controls there is no band, and one seed has no error of its mean.
            if not math.isnan(result.band):
                mean, band = 100 * abs(result.mean), 100 * result.band
                found.append(at_most(f"{name}: |mean|, goal the band of noise", "%", mean, band))
            if math.isnan(result.error):
                continue
            found.append(Row(f"{name}: its standard error", "%", 100 * result.error))
            if variant != "order":
                found.append(at_most(f"{name}: mean and twice its error", "%", 100 * result.upper, BOUND))
    read = [run["held_out_in_fp8"] / run["held_out"] - 1 for run in runs if run["variant"] == "bf16"]
    if read:
        name = "BF16's weights read in FP8, held-out loss over BF16's"
        found.append(Row(f"{name}: mean over {len(read)} seeds", "%", 100 * statistics.fmean(read)))
        found.append(Row(f"{name}: largest of a seed", "%", 100 * max(read, key=abs)))
    for variant in (*LABELS, *FAMILY[1:]):
        # Another order has other batches at each step: its curve is not comparable.
        differences = [] if variant == "order" else _largest(runs, variant)
        if differences:
            name = f"{LABELS.get(variant, 'BF16, ' + variant)}: largest difference of curves over all seeds"
            found.append(Row(name, "%", 100 * max(differences), published=_bound(variant)))
    return found


def plot(runs: Sequence[Run], file: Path) -> None:
    """Curves of FP8 and of noise relative to plain BF16, and held-out losses relative to their family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bases = {run["seed"]: run["losses"] for run in runs if run["variant"] == "bf16"}
    families = _by_seed(runs, FAMILY, QUANTITIES[0])
    shown = (*FAMILY[1:], *LABELS)
    colors = {"fp8": "C3", "fp8_power_of_two": "C1", "order": "C0"}
    for place, variant in enumerate(shown):
        color = colors.get(variant, "0.6")
        label = LABELS.get(variant, "BF16, noise on the weights" if variant == FAMILY[1] else None)
        alike = [run for run in runs if run["variant"] == variant and run["seed"] in bases]
        for number, run in enumerate(alike):
            if variant != "order":
                curve = curve_difference(run["losses"], bases[run["seed"]])
                left.plot(
                    [100 * value for value in curve], color=color, lw=1, label=None if number else label
                )
            family = families[run["seed"]]
            excess = run["held_out"] / (sum(family) / len(family)) - 1
            right.plot(place, 100 * excess, "o", color=color)
    for panel in (left, right):
        panel.axhspan(-BOUND, BOUND, color="C2", alpha=0.2, lw=0)
    left.set(xlabel="step", ylabel="% over BF16, training loss, EMA 0.9")
    if left.lines:
        left.legend(fontsize=8)
    right.set_xticks(range(len(shown)), shown, rotation=20)
    right.set_ylabel("% over the seed's BF16 runs, held-out loss")
    figure.savefig(file, dpi=110)


def _bound(variant: str) -> float | None:
    return BOUND if variant.startswith("fp8") else None


def _by_seed(runs: Sequence[Run], variants: Sequence[str], quantity: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for run in runs:
        if run["variant"] in variants:
            value = run["held_out"] if quantity == QUANTITIES[0] else ema(run["losses"])[-1]
            found.setdefault(run["seed"], []).append(value)
    return found


def _largest(runs: Sequence[Run], variant: str) -> list[float]:
    bases = {run["seed"]: run["losses"] for run in runs if run["variant"] == "bf16"}
    return [
        largest_difference(run["losses"], bases[run["seed"]])
        for run in runs
        if run["variant"] == variant and run["seed"] in bases
    ]
