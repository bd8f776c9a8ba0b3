"""The card of the report, as the planner describes it."""

from __future__ import annotations

from infra.cluster.machines import MACHINES

H800 = MACHINES["h800"]
