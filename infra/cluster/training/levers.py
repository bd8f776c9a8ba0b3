"""Whether a layout fits a card's memory, and where it does not, the one change that frees most.

Each lever is tried: the changed layout is checked and counted like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import RECOMPUTED, Layout
from infra.cluster.training.memory import Live, RankMemory, memory

LiveOf = Callable[[Layout], Sequence[Live]]
"""Live micro-batches of each rank of a layout, from its schedule replayed."""


@dataclass(frozen=True)
class Lever:
    """One change to a layout."""

    change: str
    """For people: `layout.zero 1 -> 2`."""
    layout: Layout
    frees: float
    """Bytes less on the fullest rank; negative where it takes more."""


@dataclass(frozen=True)
class Fit:
    """A layout's memory against what a card has, in bytes."""

    ranks: tuple[RankMemory, ...]
    capacity: float
    levers: tuple[Lever, ...] | None = None
    """What frees something, the most first; empty where the layout fits, None where none was sought."""

    @property
    def fullest(self) -> int:
        """The rank that takes most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].total)

    @property
    def spare(self) -> float:
        """What the fullest rank leaves; negative where it does not fit."""
        return self.capacity - self.ranks[self.fullest].total

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    def explanation(self) -> str:
        """One sentence: how much is taken, and where it is too much, the largest lever."""
        taken = self.ranks[self.fullest].total
        text = f"rank {self.fullest} takes {_gib(taken)} of {_gib(self.capacity)}"
        if self.fits:
            return f"fits: {text}"
        if self.levers is None:
            return f"does not fit: {text}"
        if not self.levers:
            return f"does not fit: {text}, and no single change frees any"
        first = self.levers[0]
        enough = "" if first.frees >= -self.spare else ", which is not enough alone"
        return f"does not fit: {text}. {first.change} frees most, {_gib(first.frees)}{enough}"


def fit(
    shape: ModelShape,
    layout: Layout,
    capacity: float,
    live: LiveOf,
    gpus_per_node: int = 8,
    load: float = 1.0,
) -> Fit:
    """Memory of a layout against a card's `capacity` in bytes; `load` is that of `memory`.

    Raises:
        ConfigError: the model does not fit the layout.
    """
    layout.check(shape, gpus_per_node)
    ranks = memory(shape, layout, live(layout), load)
    found = Fit(ranks, capacity, ())
    if found.fits:
        return found
    taken, levers = ranks[found.fullest].total, []
    for change, other in _changes(shape, layout, gpus_per_node):
        less = taken - max(rank.total for rank in memory(shape, other, live(other), load))
        if less > 0:
            levers.append(Lever(change, other, less))
    return replace(found, levers=tuple(sorted(levers, key=lambda lever: -lever.frees)))


def _changes(shape: ModelShape, layout: Layout, gpus_per_node: int) -> Iterator[tuple[str, Layout]]:
    """Every single step that may free memory and is a layout that can run, and what to call it."""
    x = layout
    steps: dict[str, Iterable[Any]] = {
        "pipeline": range(x.pipeline + 1, shape.num_hidden_layers + 1),
        "expert": range(x.expert + 1, shape.n_routed_experts + 1),
        "zero": range(x.zero + 1, 4),
        "micro_batch": range(x.micro_batch - 1, 0, -1),
        "moments": [] if x.moments == "bf16" else ["bf16"],
    }
    for field, values in steps.items():
        # Another number of stages wants another split.
        also = {"layers": ()} if field == "pipeline" else {}
        found = (x.changed(shape, gpus_per_node, **{field: value}, **also) for value in values)
        if other := next((layout for layout in found if layout is not None), None):
            yield f"layout.{field} {getattr(x, field)} -> {getattr(other, field)}", other
    for item in RECOMPUTED:
        if item not in x.recompute and "full" not in x.recompute:
            yield f"layout.recompute with {item}", replace(x, recompute=x.recompute | {item})


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
