"""The flows that deployments point at: `flows.deployed:NAME` for each stage, the pipeline and its refresh."""

from __future__ import annotations

from flows.pipeline import pipeline_flow, stage_flow
from flows.refresh import refresh_flow
from flows.registry import stages

STAGES = {name: stage_flow(stage) for name, stage in stages().items()}
FLOWS = STAGES | {"pipeline": pipeline_flow(), "refresh": refresh_flow()}
# A deployment's entrypoint names an attribute of a module, so each flow is one.
globals().update(FLOWS)
