"""One optimizer step of a training run: its pipeline replayed, its optimizer counted, and what follows."""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.counts.accounting import training_operations
from infra.cluster.counts.weights import Part
from infra.cluster.machines import Machine
from infra.cluster.network.collectives import BF16_BYTES, FP32_BYTES, boundary, zero1
from infra.cluster.pipeline.replay import Timeline, fullest, replay
from infra.cluster.pipeline.times import StageTimes
from infra.cluster.published import Phases
from infra.cluster.shape import ModelShape
from infra.cluster.training.chunk import stage_times
from infra.cluster.training.fit import fitted, mean_phases
from infra.cluster.training.layout import Layout
from infra.cluster.training.levers import LiveOf
from infra.cluster.training.memory import stage_kept
from infra.cluster.training.stages import rank_weights
from infra.errors import ConfigError
from infra.parallel.actions import Schedule
from infra.parallel.schedules import build


@dataclass(frozen=True)
class StepPlan:
    """A step, its chunk times predicted from the machine or fitted to published phases."""

    shape: ModelShape
    layout: Layout
    machine: Machine
    timeline: Timeline
    optimizer: float
    """Seconds of gradient exchange, update and weight exchange, nothing of it hidden."""

    @property
    def seconds(self) -> float:
        return self.timeline.makespan + self.optimizer

    @property
    def phases(self) -> Phases:
        """Means over the pipeline's ranks."""
        return mean_phases(self.timeline, self.optimizer)

    @property
    def exposed(self) -> float:
        """Seconds of all-to-all that nothing hides, mean over ranks."""
        return sum(self.timeline.exposed) / len(self.timeline.exposed)

    def mfu(self, causal: bool = True) -> float:
        """Model operations over the BF16 peak of all GPUs (in FP32 over that of FP32), as ISCA'25 table 4
        counts it: without MTP, without recomputation, the whole square of attention if not `causal`."""
        work = training_operations(self.shape, self.layout.length, causal=causal).total
        peak = self.machine.peak("fp32" if self.layout.precision == "fp32" else "bf16")
        return work * self.layout.step_tokens / (self.seconds * self.layout.gpus * peak)

    @property
    def tokens_a_day(self) -> float:
        return self.layout.step_tokens / self.seconds * 86400

    def gpu_hours(self, tokens: float) -> float:
        """GPU-hours to train on so many tokens."""
        return tokens / self.layout.step_tokens * self.seconds * self.layout.gpus / 3600


def predict(shape: ModelShape, layout: Layout, machine: Machine, imbalance: float = 1.0) -> StepPlan:
    """A step from the machine's description alone.

    Raises ConfigError for a layout that cannot run, with the nearest that can.
    """
    layout.check(shape, machine.gpus_per_node)
    times = stage_times(shape, layout, machine, imbalance)
    return _step(shape, layout, machine, times)


def replayed(
    shape: ModelShape, layout: Layout, machine: Machine, phases: Phases, even: bool = False
) -> StepPlan:
    """A step whose chunk times are fitted to published phase times.

    The stages differ as the prediction says, or not at all if `even`. The published bubble and step are not
    used; the optimizer's time is, as a phase like the others.
    """
    layout.check(shape, machine.gpus_per_node)
    likeness = (
        StageTimes.uniform(layout.stages, 1, 1, 1, pair=3) if even else stage_times(shape, layout, machine)
    )
    times = fitted(schedule(layout), likeness, phases)
    return _step(shape, layout, machine, times, phases.optimizer)


def measured(shape: ModelShape, layout: Layout, machine: Machine, times: StageTimes) -> StepPlan:
    """A step with the durations of a trace; its transfers and its optimizer are predicted.

    Raises ConfigError where `times` are of another number of stages.
    """
    layout.check(shape, machine.gpus_per_node)
    if times.stages != layout.stages:
        raise ConfigError(
            f"the trace has {times.stages} stages, layout.pipeline = {layout.pipeline} makes "
            f"{layout.stages}: plan the layout that was traced"
        )
    return _step(shape, layout, machine, times)


def schedule(layout: Layout) -> Schedule:
    """The layout's pipeline as data."""
    return build(layout.schedule, layout.stages, layout.micro_batches)


def live(shape: ModelShape) -> LiveOf:
    """Of a layout: micro-batches whose activations each rank holds when they take most bytes, for each stage
    it has. They come out of the schedule's programs."""

    def of(layout: Layout) -> list[tuple[int, ...]]:
        kept = [stage_kept(shape, layout, stage) for stage in range(layout.stages)]
        found = fullest(schedule(layout), kept)
        return [tuple(held[stage] for stage in layout.held(rank)) for rank, held in enumerate(found)]

    return of


def optimizer_seconds(shape: ModelShape, layout: Layout, machine: Machine) -> float:
    """Of the slowest pipeline rank, nothing of it hidden: gradients to their owners, AdamW, weights back.

    ZeRO 1 does this once a step (report §3.2). Without it all replicas add up gradients and update all
    weights. ZeRO 2 sends gradients away after every micro-batch, ZeRO 3 gathers weights before every pass.
    """
    return max(_optimizer(shape, layout, machine, rank) for rank in range(layout.pipeline))


def _optimizer(shape: ModelShape, layout: Layout, machine: Machine, rank: int) -> float:
    weights = [weight for weight in rank_weights(shape, layout, rank) if weight.trained]
    routed = sum(weight.elements for weight in weights if weight.part is Part.ROUTED) // layout.expert
    # GPUs that share a sequence share dense weights too, and send as much as if each had all of them.
    dense = sum(weight.elements for weight in weights if weight.part is not Part.ROUTED)
    # DualPipe holds every stage on two ranks, whose replicas are one group.
    replicas = layout.rank_gpus * (2 if layout.schedule == "dualpipe" else 1)
    value = FP32_BYTES if layout.precision == "fp32" or layout.zero == 0 else BF16_BYTES
    seconds = 0.0
    if replicas > 1:
        sent = zero1(dense, routed, replicas, layout.expert, machine, FP32_BYTES, value)
        gradients = sent.dense.gradients.seconds + sent.experts.gradients.seconds
        gather = sent.dense.gather.seconds + sent.experts.gather.seconds
        passes = layout.micro_batches if layout.zero >= 2 else 1
        seconds = gradients * passes + gather * (2 * layout.micro_batches if layout.zero == 3 else 1)
    owned = float(dense + routed)
    if layout.zero:
        owned = dense / replicas + routed / (replicas // layout.expert)
    # Gradient, master weight and both moments read, master and moments written (`kernels.optim.adamw`).
    moved = owned * (12 + 4 * (2 if layout.moments == "bf16" else 4))
    return seconds + moved / (machine.memory_bandwidth * machine.rates.stream)


def _step(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    times: StageTimes,
    optimizer: float | None = None,
) -> StepPlan:
    within = layout.gpus <= machine.gpus_per_node
    transfer = 0.0
    if layout.pipeline > 1:
        value = 4.0 if layout.precision == "fp32" else 2.0
        transfer = boundary(layout.micro_tokens, shape.hidden_size, machine, value, within).seconds
    timeline = replay(schedule(layout), times, transfer)
    if optimizer is None:
        optimizer = optimizer_seconds(shape, layout, machine)
    return StepPlan(shape, layout, machine, timeline, optimizer)
