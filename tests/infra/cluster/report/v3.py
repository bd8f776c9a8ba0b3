"""The report's own run, planned once for all tests of what is told of it."""

from __future__ import annotations

from functools import lru_cache

from flows.planning import planned
from flows.preset import load
from infra.cluster.plan import Plan
from infra.cluster.report.chapter import Chapter
from infra.cluster.report.tell import tell


@lru_cache(maxsize=1)
def plan() -> Plan:
    return planned(load("v3"))


@lru_cache(maxsize=1)
def chapters() -> tuple[Chapter, ...]:
    return tuple(tell(plan()))
