"""Chapter: does it fit, how long, how much, and where the time goes."""

from __future__ import annotations

from infra.cluster.cost import days
from infra.cluster.pipeline.timeline import svg
from infra.cluster.plan import Plan
from infra.cluster.report.chapter import Chapter, Table, figure
from kernels.figures import Row

SHORT = 0.1
"""Seconds of a step under which launching kernels takes most of it."""


def answer_chapter(plan: Plan) -> Chapter:
    """The answers in one screen, and the step drawn."""
    asked, step = plan.request, plan.step
    layout, first = step.layout, asked.phases[0]
    hours = sum(each.step.gpu_hours(each.phase.tokens) for each in plan.phases if each.step)
    rows = (
        figure("GPUs", "GPUs", layout.gpus),
        figure("tokens of pretraining", "tokens", first.tokens),
        figure("step", "s", step.seconds),
        figure("MFU, causal", "of peak", step.mfu()),
        figure("days", "days", days(hours, layout.gpus)),
        figure("GPU-hours", "hours", hours),
        figure("cost", "dollars", hours * asked.price),
        figure("fullest GPU", "GiB", plan.fit.ranks[plan.fit.fullest].total / 2**30),
        Row("memory of a GPU", "GiB", plan.fit.capacity / 2**30, holds=plan.fit.fits),
    )
    phases, total = step.phases, step.seconds
    exposed = step.exposed
    parts = (
        ("passes overlapped in pairs", phases.pair),
        ("forward passes alone", phases.forward),
        ("backward passes alone", phases.backward + phases.weights),
        ("idle (bubble)", phases.bubble),
        ("optimizer and its exchange", phases.optimizer),
    )
    shares = tuple((name, seconds, f"{100 * seconds / total:.1f}%") for name, seconds in parts if seconds)
    notes = [f"It {plan.fit.explanation()}."]
    notes += [
        f"{each.phase.name} {each.fit.explanation() if each.fit else 'cannot run: ' + each.problem}."
        for each in plan.extensions
    ]
    if exposed:
        notes.append(
            f"Of the passes {exposed:.4g} s ({100 * exposed / total:.1f}%) are communication in the open."
        )
    if total < SHORT:
        notes.append(
            "Launches and the host are in no figure: a real step of so small a model takes much longer."
        )
    table = Table("Where a step's time goes", ("part", "s", "share"), shares)
    return Chapter("In short", rows, (table,), tuple(notes), svg(step.timeline))
