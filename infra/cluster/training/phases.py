"""The phases of a training run, each with its layout: pretraining, and extensions on longer rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from infra.cluster.machines import Machine
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import REPORT_RECOMPUTES, Layout
from infra.cluster.training.levers import Fit
from infra.cluster.training.memory import memory
from infra.cluster.training.step import StepPlan, live, predict
from infra.errors import ConfigError


@dataclass(frozen=True)
class TrainingPhase:
    """Steps of one kind: so many tokens in rows of `length`, `global_batch` of them a step."""

    name: str
    tokens: float
    length: int
    global_batch: int
    micro_batch: int = 1
    """Rows of a micro-batch, where the batch has enough of them for the pipeline."""
    precision: str = "fp8"
    moments: str = "bf16"
    recompute: frozenset[str] = REPORT_RECOMPUTES


def phase_layouts(
    shape: ModelShape, layout: Layout, phase: TrainingPhase, machine: Machine
) -> tuple[Layout, ...]:
    """Layouts that can run a phase on the run's pipeline: its batch of fewer, longer rows may want one row a
    micro-batch and several GPUs to a row, and more to be made again going back.

    Raises ConfigError if none can, with what is wrong before any GPUs share a row.
    """
    found, problem = [], ""
    policies = dict.fromkeys((phase.recompute, frozenset({"full"})))
    for recompute in policies:
        for micro_batch in dict.fromkeys((phase.micro_batch, 1)):
            tensor = layout.tensor
            while tensor <= layout.rank_gpus:
                try:
                    other = replace(
                        layout,
                        length=phase.length,
                        global_batch=phase.global_batch,
                        micro_batch=micro_batch,
                        tensor=tensor,
                        precision=phase.precision,
                        moments=phase.moments,
                        recompute=recompute,
                    )
                    other.check(shape, machine.gpus_per_node)
                    found.append(other)
                except ConfigError as error:
                    problem = problem or str(error)
                tensor *= 2
    if not found:
        raise ConfigError(f"{phase.name}: {problem}")
    return tuple(found)


def predict_phase(
    shape: ModelShape, layout: Layout, phase: TrainingPhase, machine: Machine
) -> tuple[StepPlan, Fit]:
    """A step of the phase and its memory: the fastest layout that fits, or the one nearest to fitting."""
    held = live(shape)
    fits = [
        (other, Fit(memory(shape, other, held(other)), machine.memory))
        for other in phase_layouts(shape, layout, phase, machine)
    ]
    fitting = [(predict(shape, other, machine), fit) for other, fit in fits if fit.fits]
    if fitting:
        return min(fitting, key=lambda each: each[0].seconds)
    nearest, fit = max(fits, key=lambda each: each[1].spare)
    return predict(shape, nearest, machine), fit
