"""Chapter: what a GPU of each pipeline rank holds, and whether it fits."""

from __future__ import annotations

from infra.cluster.plan import Plan
from infra.cluster.report.chapter import Chapter, Table, figure
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import Layout
from infra.cluster.training.memory import stage_kept
from infra.cluster.training.stages import notes, stage_layers

GIB = 2**30


def memory_chapter(plan: Plan) -> Chapter:
    """Bytes by component and rank; where they do not fit, the levers, the largest first."""
    fit, step = plan.fit, plan.step
    fullest = fit.ranks[fit.fullest]
    rows = (
        figure("fullest rank", "GiB a GPU", fullest.total / GIB),
        figure("of a card's", "GiB", fit.capacity / GIB),
        figure("micro-batches alive on it", "micro-batches", step.timeline.live[fit.fullest]),
    )
    names = tuple(fullest.by_component())
    lines = [
        (
            f"rank {rank}",
            *(value / GIB for value in each.by_component().values()),
            each.total / GIB,
            step.timeline.live[rank],
        )
        for rank, each in enumerate(fit.ranks)
    ]
    tables = [Table("GiB of one GPU by pipeline rank", ("rank", *names, "total", "live"), tuple(lines))]
    tables.append(_stages(plan.request.shape, step.layout))
    if fit.levers:
        tables.append(
            Table(
                "Single changes that free memory",
                ("change", "frees, GiB"),
                tuple((lever.change, lever.frees / GIB) for lever in fit.levers),
            )
        )
    told = (f"It {fit.explanation()}.", *(f"{note}." for note in notes(plan.request.shape, step.layout)))
    return Chapter("Memory", rows, tuple(tables), told)


def _stages(shape: ModelShape, layout: Layout) -> Table:
    """What each stage keeps of a micro-batch from its forward to its backward pass."""
    lines = tuple(
        (f"stage {stage}", len(layers), layout.micro_tokens * stage_kept(shape, layout, stage) / GIB)
        for stage, layers in enumerate(stage_layers(shape, layout))
    )
    return Table("Activations of one micro-batch by stage", ("stage", "layers", "GiB a GPU"), lines)
