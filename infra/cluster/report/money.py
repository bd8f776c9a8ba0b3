"""Chapter: GPU-hours and dollars by phase, each with the origin of its figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from infra.cluster.cost import PUBLISHED_PRICE, R1_PUBLISHED, V3_PUBLISHED, Bill, Phase, days, of_steps
from infra.cluster.origin import Origin
from infra.cluster.plan import PlannedPhase
from infra.cluster.report.chapter import Chapter, Table, beside, figure
from infra.cluster.report.training import Steps
from infra.cluster.training.phases import TrainingPhase
from infra.cluster.training.step import StepPlan
from kernels.figures import Row

EXTENSION = "context extension"
"""What hours are called that stand for all extensions together."""


def cost_chapter(
    found: Steps, phases: Sequence[PlannedPhase], stated: Mapping[str, float], price: float, is_v3: bool
) -> Chapter:
    """`phases` are pretraining and extensions, predicted. `stated` are hours given from outside, by name."""
    gpus = found.predicted.layout.gpus
    first = Origin.REPLAYED if found.measured else Origin.PREDICTED
    planned = [each for each in phases if each.step]
    predicted = [
        _phase(each.phase, each.step, Origin.PREDICTED if number else first)
        for number, each in enumerate(planned)
        if each.step
    ]
    outside = [_stated(name, hours) for name, hours in stated.items()]
    # Hours of the extension that were stated are not added to those that were predicted, if all of them were.
    replaced = len(phases) > 1 and len(planned) == len(phases)
    rest = [phase for phase in outside if phase.name != EXTENSION or not replaced]
    # Sums are compared where they are of the same phases.
    whole = is_v3 and replaced and set(outside) == set(V3_PUBLISHED[1:])
    bill = Bill((*predicted, *rest), price)
    rows = _totals("with the trace's durations" if found.measured else "predicted", bill, whole)
    tables = [_table("With the trace's durations" if found.measured else "Predicted", bill, gpus)]
    if found.fitted:
        again = _phase(phases[0].phase, found.fitted, Origin.REPLAYED)
        second = Bill((again, *outside), price)
        rows += _totals("replayed", second, whole)
        tables.append(_table("Replayed with published phase times", second, gpus))
    if is_v3:
        tables.append(_table("Published (report, table 1)", Bill(V3_PUBLISHED, PUBLISHED_PRICE), gpus))
        tables.append(_table("DeepSeek-R1 on top (published)", Bill(R1_PUBLISHED, PUBLISHED_PRICE), 0))
    if is_v3 and replaced:
        extension = sum(phase.gpu_hours for phase in predicted[1:])
        rows.append(
            beside(
                "predicted: GPU-hours of context extension",
                "thousand",
                extension / 1e3,
                V3_PUBLISHED[1].gpu_hours / 1e3,
            )
        )
    notes = list(_notes(phases, price))
    notes += [
        f"{phase.gpu_hours:,.0f} GPU-hours of {phase.name} are stated, and not added: it is predicted."
        for phase in outside
        if phase not in rest
    ]
    if is_v3:
        notes.append("How DeepSeek laid out the extensions is not published.")
    return Chapter("Cost", tuple(rows), tuple(tables), tuple(notes))


def _notes(phases: Sequence[PlannedPhase], price: float) -> Iterator[str]:
    yield f"At {price:g} dollars a GPU-hour. Research, failed runs and data are in no row."
    for each in phases[1:]:
        if each.step is None:
            yield f"{each.phase.name} is not counted: {each.problem}."
            continue
        layout = each.step.layout
        changes = [f"{layout.tensor} GPUs to a row of {layout.length:,} tokens"] if layout.tensor > 1 else []
        changes += ["everything made again going back"] if "full" in layout.recompute else []
        told = " and ".join(changes) or "the run's own layout"
        fits = each.fit.explanation() if each.fit else ""
        fitting = each.fit and each.fit.fits
        best = "the fastest of the layouts that fit" if fitting else "the nearest to fitting"
        yield f"{each.phase.name} is planned with {told}, {best}: it {fits}."


def _stated(name: str, hours: float) -> Phase:
    """Hours from outside: the report's where they are those, else the planner's."""
    published = Phase(name, hours, Origin.PUBLISHED)
    return published if published in V3_PUBLISHED else Phase(name, hours, Origin.STATED)


def _phase(phase: TrainingPhase, plan: StepPlan, origin: Origin) -> Phase:
    layout = plan.layout
    return of_steps(phase.name, phase.tokens, layout.step_tokens, plan.seconds, layout.gpus, origin)


def _totals(name: str, bill: Bill, comparable: bool) -> list[Row]:
    total, published = bill.total(), Bill(V3_PUBLISHED, PUBLISHED_PRICE).total()
    label = f"{name}: all phases ({total.label})"
    hours, dollars = total.gpu_hours / 1e3, total.dollars / 1e6
    if not comparable:
        return [
            figure(f"{label}, GPU-hours", "thousand", hours),
            figure(label, "million dollars", dollars),
        ]
    costs = beside(label, "million dollars", dollars, published.dollars / 1e6)
    if bill.dollars_an_hour != PUBLISHED_PRICE:
        costs = figure(label, "million dollars", dollars)
    return [beside(f"{label}, GPU-hours", "thousand", hours, published.gpu_hours / 1e3), costs]


def _table(title: str, bill: Bill, gpus: int) -> Table:
    lines = [
        (
            phase.name,
            phase.gpu_hours,
            bill.dollars(phase),
            days(phase.gpu_hours, gpus) if gpus else None,
            str(phase.origin),
        )
        for phase in bill.phases
    ]
    total = bill.total()
    lines.append(("sum", total.gpu_hours, total.dollars, None, total.label))
    return Table(title, ("phase", "GPU-hours", "dollars", "days", "origin"), tuple(lines))
