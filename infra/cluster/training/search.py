"""Layouts of a model on so many GPUs: the fastest that fit first, each with what its time goes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from infra.cluster.machines import Machine
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import REPORT_RECOMPUTES, Layout
from infra.cluster.training.levers import Fit
from infra.cluster.training.memory import memory
from infra.cluster.training.stages import settled
from infra.cluster.training.step import StepPlan, live, predict
from infra.errors import ConfigError

SCHEDULES = ("dualpipe", "dualpipev", "zb1p", "1f1b")
MICRO_BATCHES = (1, 2, 4)


@dataclass(frozen=True)
class Space:
    """What every layout of a search has in common."""

    gpus: int
    length: int
    global_batch: int
    precision: str = "fp8"
    moments: str = "bf16"
    zero: int = 1
    recompute: frozenset[str] = REPORT_RECOMPUTES
    """A policy that is tried beside recomputing nothing and everything."""

    @property
    def policies(self) -> tuple[frozenset[str], ...]:
        """What may be made again going back."""
        return tuple(dict.fromkeys((self.recompute, frozenset(), frozenset({"full"}))))

    @property
    def common(self) -> dict[str, Any]:
        """Fields that every layout has."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recompute"}


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and its step."""

    step: StepPlan
    fit: Fit

    @property
    def layout(self) -> Layout:
        return self.step.layout

    @property
    def reason(self) -> str:
        """What its time and memory go to, in words."""
        seconds, phases = self.step.seconds, self.step.phases
        parts = [f"bubble {100 * phases.bubble / seconds:.0f}%"]
        if self.step.exposed:
            parts.append(f"communication in the open {100 * self.step.exposed / seconds:.0f}%")
        parts.append(f"optimizer {100 * self.step.optimizer / seconds:.0f}%")
        parts.append(self.fit.explanation().removeprefix("fits: "))
        return "; ".join(parts)


@dataclass(frozen=True)
class Found:
    """What a search found."""

    fitting: tuple[Candidate, ...]
    """By step time."""
    others: tuple[tuple[Layout, Fit], ...]
    """Those that can run but do not fit, the least excess first."""


def search(shape: ModelShape, space: Space, machine: Machine) -> Found:
    """Layouts of a space: those that fit by step time, and the others.

    Pipeline and expert parallelism, schedule, micro-batch and recomputation are varied; ZeRO and the GPUs of
    a sequence are not.
    """
    fitting, others = [], []
    held = live(shape)
    for layout in layouts(shape, space, machine):
        # A micro-batch alive on every stage is the least that any schedule holds.
        least = [(1,) * len(layout.held(rank)) for rank in range(layout.pipeline)]
        fit = Fit(memory(shape, layout, least), machine.memory)
        if fit.fits:
            fit = Fit(memory(shape, layout, held(layout)), machine.memory)
        if fit.fits:
            fitting.append(Candidate(predict(shape, layout, machine), fit))
        else:
            others.append((layout, fit))
    fitting.sort(key=lambda each: each.step.seconds)
    others.sort(key=lambda each: -each[1].spare)
    return Found(tuple(fitting), tuple(others))


def layouts(shape: ModelShape, space: Space, machine: Machine) -> Iterator[Layout]:
    """The layouts that can run, in a fixed order."""
    for pipeline in _divisors(space.gpus, shape.num_hidden_layers):
        for expert in _divisors(shape.n_routed_experts, space.gpus // pipeline):
            for schedule in SCHEDULES if pipeline > 1 else ("1f1b",):
                for micro_batch in MICRO_BATCHES:
                    for recompute in space.policies:
                        try:
                            layout = Layout(
                                **space.common,
                                pipeline=pipeline,
                                expert=expert,
                                schedule=schedule,
                                micro_batch=micro_batch,
                                recompute=recompute,
                            )
                            layout.check(shape, machine.gpus_per_node)
                        except ConfigError:
                            continue
                        yield settled(shape, layout)


def _divisors(number: int, most: int) -> list[int]:
    return [value for value in range(1, min(number, most) + 1) if number % value == 0]
