"""The pipeline schedules by name, and what each demands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infra.errors import ConfigError, nearest
from infra.parallel import dualpipe, dualpipev, one_f_one_b, zb1p
from infra.parallel.actions import Schedule
from infra.parallel.program import Demands


@dataclass(frozen=True)
class Method:
    """A way to schedule a pipeline: `build(stages, micro_batches)`, and what it demands of the two."""

    name: str
    build: Callable[[int, int], Schedule]
    demands: Demands
    stages_per_rank: int = 1
    """Stages of the pipeline for each device along it: 2 where one device holds both arms of the V."""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(one_f_one_b.NAME, one_f_one_b.one_f_one_b, one_f_one_b.DEMANDS),
        Method(zb1p.NAME, zb1p.zb1p, zb1p.DEMANDS),
        Method(dualpipe.NAME, dualpipe.dualpipe, dualpipe.DEMANDS),
        Method(dualpipev.NAME, dualpipev.dualpipev, dualpipev.DEMANDS, stages_per_rank=2),
    )
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in METHODS:
        raise ConfigError(f"schedule: no pipeline schedule is called {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def build(name: str, stages: int, micro_batches: int) -> Schedule:
    """The schedule called `name` (`1f1b`, `zb1p`, `dualpipe`, `dualpipev`).

    Raises:
        ConfigError: The name is unknown, or the method cannot schedule so many stages or micro-batches.
    """
    return method(name).build(stages, micro_batches)
