"""A plan: a model, the machines, the phases of its training, and what each of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES, Machine
from infra.cluster.pipeline.times import StageTimes
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.disaggregation import Traffic
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import Layout
from infra.cluster.training.levers import Fit, fit
from infra.cluster.training.phases import TrainingPhase, predict_phase
from infra.cluster.training.step import StepPlan, live, measured, predict
from infra.errors import ConfigError

REPORT_PHASES = (
    TrainingPhase("pretraining", 14.8e12, 4096, 15360),
    TrainingPhase("extend_32k", 1000 * 1920 * 32768, 32768, 1920),
    TrainingPhase("extend_128k", 1000 * 480 * 131072, 131072, 480),
)
"""Report §4.2 and §4.3, by the names of preset v3."""
TRAFFIC = Traffic(requests_per_second=100.0, prompt=4096, output=1024)
"""What units are sized for where nothing else is asked."""


@dataclass(frozen=True)
class Request:
    """What is asked: everything that a preset says of a run."""

    title: str
    subtitle: str
    shape: ModelShape
    layout: Layout
    machine: Machine
    phases: tuple[TrainingPhase, ...]
    """Pretraining first."""
    price: float = 2.0
    """Dollars a GPU-hour."""
    stated_hours: Mapping[str, float] = field(default_factory=dict)
    """GPU-hours of phases given from outside."""
    prefill: Deployment | None = None
    decode: Deployment | None = None
    traffic: Traffic = TRAFFIC
    times: StageTimes | None = None
    """Durations of pretraining's passes from a trace, instead of predicted ones."""

    @property
    def published_model(self) -> bool:
        """Whether the report's figures are of this model."""
        return all(
            getattr(self.shape, f.name) == getattr(DEEPSEEK_V3, f.name)
            for f in fields(DEEPSEEK_V3)
            if f.name != "name"
        )

    @property
    def published_run(self) -> bool:
        """Whether the report's figures are of this run."""
        run = self.layout == Layout() and self.machine == MACHINES["h800"] and self.phases == REPORT_PHASES
        return self.published_model and run and self.times is None


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its step and its memory; without them where no layout can run it."""

    phase: TrainingPhase
    step: StepPlan | None
    fit: Fit | None
    problem: str = ""
    """Why no layout can."""


@dataclass(frozen=True)
class Plan:
    """What was asked, and the answers that several chapters need."""

    request: Request
    step: StepPlan
    """A step of pretraining."""
    fit: Fit
    extensions: tuple[PlannedPhase, ...]

    @property
    def phases(self) -> tuple[PlannedPhase, ...]:
        """Pretraining and the extensions."""
        return (PlannedPhase(self.request.phases[0], self.step, self.fit), *self.extensions)


def plan(request: Request) -> Plan:
    """Every phase of a run, and what of it fits.

    An extension that no layout can run is told as such. Raises ConfigError where pretraining cannot run,
    naming the field and the nearest value that can.
    """
    shape, machine, layout = request.shape, request.machine, request.layout
    if request.times:
        step = measured(shape, layout, machine, request.times)
    else:
        step = predict(shape, layout, machine)
    memory = fit(shape, layout, machine.memory, live(shape), machine.gpus_per_node)
    extensions = tuple(_extension(request, phase) for phase in request.phases[1:])
    return Plan(request, step, memory, extensions)


def _extension(request: Request, phase: TrainingPhase) -> PlannedPhase:
    try:
        step, memory = predict_phase(request.shape, request.layout, phase, request.machine)
    except ConfigError as error:
        return PlannedPhase(phase, None, None, str(error).removeprefix(f"{phase.name}: "))
    return PlannedPhase(phase, step, memory)
