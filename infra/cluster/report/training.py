"""Chapter: one optimizer step, replayed and predicted, and how long the tokens take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infra.cluster import published
from infra.cluster.cost import V3_PUBLISHED
from infra.cluster.machines import Rates
from infra.cluster.plan import PlannedPhase
from infra.cluster.report.chapter import Chapter, Table, beside, figure
from infra.cluster.training.chunk import layer_exchange
from infra.cluster.training.stages import stage_layers
from infra.cluster.training.step import StepPlan, predict, replayed
from kernels.figures import Row

TRILLION = 1e12
GOAL = 0.05
"""How near the prediction wants to come."""
IMBALANCES = (1.0, 1.1, 1.2, 1.3)


@dataclass(frozen=True)
class Steps:
    """The same step three ways; the replayed ones only where phase times of a real run are known."""

    predicted: StepPlan
    measured: bool = False
    """Whether `predicted` has the durations of a trace instead."""
    fitted: StepPlan | None = None
    """Chunk times fitted to the published phases, stages as unequal as predicted."""
    fitted_even: StepPlan | None = None
    """The same with all stages alike."""


def steps(predicted: StepPlan, is_v3: bool, measured: bool = False) -> Steps:
    """With the published phases of DeepSeek-V3's step where it is that step."""
    if not is_v3:
        return Steps(predicted, measured)
    shape, layout, machine = predicted.shape, predicted.layout, predicted.machine
    return Steps(
        predicted,
        measured,
        replayed(shape, layout, machine, published.STEP),
        replayed(shape, layout, machine, published.STEP, even=True),
    )


def step_chapter(found: Steps, phases: Sequence[PlannedPhase]) -> Chapter:
    """Seconds by phase, bubble, exposed communication, MFU, tokens a day, hours."""
    plan, tokens = found.predicted, phases[0].phase.tokens
    layout = plan.layout
    rows: list[Row] = []
    for planned in phases:
        phase = planned.phase
        name = f"tokens of a step, {phase.name}, rows of {phase.length:,}"
        count = phase.length * phase.global_batch
        if found.fitted:
            rows.append(beside(name, "tokens", count, published.TOKENS_A_STEP.value, 0.0, must=True))
        else:
            rows.append(figure(name, "tokens", count))
    if found.fitted:
        rows += _rows("replayed", found.fitted, tokens, goal=None)
        rows += _rows("predicted", plan, tokens, goal=GOAL)
    else:
        rows += _plain(plan, tokens)
    notes = _notes(found)
    tables = [_phases(found)]
    if found.fitted and layout.expert > 1:
        tables.append(_sensitivity(found))
    return Chapter("One step", tuple(rows), tuple(tables), notes)


def _rows(name: str, plan: StepPlan, tokens: float, goal: float | None) -> list[Row]:
    return [
        beside(f"{name}: step", "s", plan.seconds, published.STEP.step, goal),
        beside(f"{name}: bubble, mean of the ranks", "s", plan.phases.bubble, published.STEP.bubble),
        figure(f"{name}: all-to-all that nothing hides", "s", plan.exposed),
        beside(f"{name}: MFU, causal", "of BF16 peak", plan.mfu(), published.MFU_CAUSAL.value, goal),
        beside(f"{name}: MFU, whole square", "of BF16 peak", plan.mfu(False), published.MFU_FULL.value, goal),
        beside(
            f"{name}: tokens a day",
            "billion",
            plan.tokens_a_day / 1e9,
            published.TOKENS_A_DAY.value / 1e9,
            goal,
        ),
        beside(
            f"{name}: GPU-hours a trillion tokens",
            "thousand",
            plan.gpu_hours(TRILLION) / 1e3,
            published.HOURS_A_TRILLION.value / 1e3,
            goal,
        ),
        beside(
            f"{name}: GPU-hours of pretraining",
            "thousand",
            plan.gpu_hours(tokens) / 1e3,
            V3_PUBLISHED[0].gpu_hours / 1e3,
            goal,
        ),
    ]


def _plain(plan: StepPlan, tokens: float) -> list[Row]:
    return [
        figure("step", "s", plan.seconds),
        figure("bubble, mean of the ranks", "s", plan.phases.bubble),
        figure("all-to-all that nothing hides", "s", plan.exposed),
        figure("MFU, causal", "of peak", plan.mfu()),
        figure("MFU, whole square", "of peak", plan.mfu(False)),
        figure("tokens a day", "billion", plan.tokens_a_day / 1e9),
        figure("GPU-hours of pretraining", "hours", plan.gpu_hours(tokens)),
        figure("days of pretraining", "days", plan.gpu_hours(tokens) / plan.layout.gpus / 24),
    ]


def _phases(found: Steps) -> Table:
    named = [("from the trace" if found.measured else "predicted", found.predicted.phases)]
    if found.fitted and found.fitted_even:
        named = [
            ("published", published.STEP),
            ("replayed", found.fitted.phases),
            ("replayed, equal stages", found.fitted_even.phases),
            *named,
        ]
    phases = ("forward", "backward", "weights", "pair", "bubble", "optimizer", "step")
    labels = ("1F", "1B", "1W", "1F1B (pairs)", "bubble", "optimizer", "step")
    return Table(
        "Seconds of a step by phase, means over the pipeline's ranks",
        ("phase", *(name for name, _ in named)),
        tuple(
            (label, *(getattr(each, phase) for _, each in named))
            for label, phase in zip(labels, phases, strict=True)
        ),
    )


def _sensitivity(found: Steps) -> Table:
    """What an uneven load of the experts does to the predicted step."""
    plan = found.predicted
    lines = []
    for imbalance in IMBALANCES:
        other = predict(plan.shape, plan.layout, plan.machine, imbalance)
        apart = other.seconds / published.STEP.step - 1
        lines.append((imbalance, other.seconds, other.phases.bubble, f"{100 * apart:+.1f}%"))
    return Table(
        "Predicted step by the rows of the busiest GPU's experts over the mean",
        ("imbalance", "step, s", "bubble, s", "from the published step"),
        tuple(lines),
    )


def _notes(found: Steps) -> tuple[str, ...]:
    plan = found.predicted
    if found.measured:
        return (
            "Durations of passes are the trace's, the median over its micro-batches by stage; transfers "
            "between stages and the optimizer are predicted.",
        )
    told = (
        f"Predicted: operators counted by shape, at {_rates(plan)}, "
        "all-to-all by where the gate sends tokens, the schedule replayed with these times. Nothing is "
        "fitted to a step's time. Experts are taken to be evenly loaded.",
    )
    if not found.fitted or not found.fitted_even:
        return told
    even, fitted, real = found.fitted_even.phases.bubble, found.fitted.phases.bubble, published.STEP.bubble
    apart = plan.seconds / published.STEP.step - 1
    return (
        *told,
        f"The published bubble is {real:.2f} s. With all stages alike, chunk times fitted to other phases "
        f"leave {even:.2f} s; with stages as unequal as their operators say (the last: one layer, the MTP "
        f"module and the head twice) {fitted:.2f} s. The remaining {real - fitted:.2f} s are in no schedule, "
        "and nothing was published of them. A guess: ranks do not take the same time for every micro-batch, "
        "since their experts are not loaded alike, and every wait for another counts as bubble.",
        f"The prediction is {100 * apart:+.1f}% from the published step: {_apart(plan, 'forward')} in passes "
        f"forward alone, {_apart(plan, 'backward')} in those back, {_apart(plan, 'weights')} in weight "
        f"gradients, {_apart(plan, 'pair')} in pairs, {_apart(plan, 'bubble')} in the bubble. The table "
        "shows what uneven experts would add.",
        _profiled(plan),
    )


def _apart(plan: StepPlan, phase: str) -> str:
    return f"{100 * (getattr(plan.phases, phase) / getattr(published.STEP, phase) - 1):+.1f}%"


def _rates(plan: StepPlan) -> str:
    same = plan.machine.rates == Rates()
    return "the shares of peaks that DeepSeek's kernels reach on an H800" if same else "the rates given"


def _profiled(plan: StepPlan) -> str:
    """The pair in the middle of the pipeline beside the profile that the rates come from."""
    middle = plan.layout.pipeline // 2
    pair = next(
        event
        for event in plan.timeline.rows[middle]
        if hasattr(event.step, "forward") and event.step.forward.stage == middle
    )
    exchange = layer_exchange(plan.shape, plan.layout, plan.machine)
    layers = len(stage_layers(plan.shape, plan.layout)[middle])
    moved = layers * (exchange.forward_seconds + exchange.backward_seconds) if exchange else 0.0
    profile = published.PROFILE
    return (
        "The rates were read from DeepSeek's profile of one pair of four MoE layers, evenly loaded, so its "
        f"computation agrees by construction: {1e3 * profile.computation:.1f} ms there, "
        f"{1e3 * (pair.seconds - pair.exposed):.1f} here; the whole pair {1e3 * profile.span:.1f} and "
        f"{1e3 * pair.seconds:.1f}. Its all-to-all kernels are busy for {1e3 * profile.communication:.1f} "
        f"ms, waits for other GPUs included, {1e3 * moved:.1f} here: that counts where nothing hides it. "
        "What is missing is what a real run adds to such a pair."
    )
