"""Chapter: the best layouts for a number of GPUs."""

from __future__ import annotations

from infra.cluster.machines import Machine
from infra.cluster.report.chapter import Cell, Chapter, Table
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import Layout
from infra.cluster.training.search import Space, search

SHOWN, NEAREST = 12, 3
GIB = 2**30


def layouts_chapter(shape: ModelShape, space: Space, machine: Machine) -> Chapter:
    """The fastest that fit with their reasons, and those that come nearest to fitting."""
    found = search(shape, space, machine)
    lines = tuple(
        (
            *_named(each.layout),
            each.step.seconds,
            each.step.mfu(),
            each.reason,
        )
        for each in found.fitting[:SHOWN]
    )
    named = ("PP", "EP", "DP", "schedule", "micro-batch", "a step", "recomputes")
    tables = [
        Table(
            "The fastest that fit",
            (*named, "step, s", "MFU, causal", "where time and memory go"),
            lines,
        ),
        Table(
            "The nearest to fitting",
            (*named, "GiB missing, at least"),
            tuple((*_named(layout), -fit.spare / GIB) for layout, fit in found.others[:NEAREST]),
        ),
    ]
    count = len(found.fitting) + len(found.others)
    asked = ", ".join(sorted(space.recompute)) or "nothing"
    notes = [
        f"{count} layouts of {space.gpus:,} {machine.name} can run, {len(found.fitting)} of them fit.",
        f"What is asked to be made again going back: {asked}.",
    ]
    return Chapter("Layouts", (), tuple(table for table in tables if table.rows), tuple(notes))


def _named(layout: Layout) -> tuple[Cell, ...]:
    again = "everything" if "full" in layout.recompute else "as asked" if layout.recompute else "nothing"
    return (
        layout.pipeline,
        layout.expert,
        layout.data,
        layout.schedule,
        layout.micro_batch,
        layout.micro_batches,
        again,
    )
