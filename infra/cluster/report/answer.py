"""Chapter: does it fit, how long, how much, and where the time goes."""

from __future__ import annotations

from dataclasses import replace

from infra.cluster.cost import days
from infra.cluster.pipeline.timeline import svg
from infra.cluster.plan import Plan
from infra.cluster.published import STEP
from infra.cluster.report.chapter import Chapter, Table, figure
from infra.cluster.training.layout import MODEL_RECOMPUTES
from infra.cluster.training.levers import Fit
from infra.cluster.training.memory import memory
from infra.cluster.training.step import live
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
        figure("GPU-hours of pretraining and extensions", "hours", hours),
        figure("their days", "days", days(hours, layout.gpus)),
        figure("their cost", "dollars", hours * asked.price),
        figure("memory taken on the fullest GPU", "GiB", plan.fit.ranks[plan.fit.fullest].total / 2**30),
        Row("memory that a GPU has", "GiB", plan.fit.capacity / 2**30, holds=plan.fit.fits),
    )
    phases, total = step.phases, step.seconds
    exposed = step.exposed
    parts = (
        ("passes overlapped in pairs", phases.pair),
        ("forward passes alone", phases.forward),
        ("backward passes alone, weight gradients included", phases.backward + phases.weights),
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
            f"Inside the passes {exposed:.4g} s, {100 * exposed / total:.1f}% of the step, are communication "
            "that nothing hides."
        )
    beyond = layout.recompute - MODEL_RECOMPUTES - {"full"}
    if beyond:
        today = replace(layout, recompute=layout.recompute & MODEL_RECOMPUTES)
        found = Fit(memory(asked.shape, today, live(asked.shape)(today)), asked.machine.memory)
        notes.append(
            f"The trainer makes everything of this policy again but {' and '.join(sorted(beyond))}: as it "
            f"is, the run {found.explanation()}."
        )
    if asked.published_run:
        apart = 100 * (total / STEP.step - 1)
        notes.append(f"All times are predicted: a step comes out {apart:+.1f}% from the published one.")
    if total < SHORT:
        notes.append(
            "Launches and the host are in no figure: a real step of so small a model takes much longer."
        )
    table = Table("Where a step's time goes", ("part", "s", "share"), shares)
    return Chapter("In short", rows, (table,), tuple(notes), svg(step.timeline))
