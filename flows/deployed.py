"""The flows that deployments point at: `flows.deployed:NAME` for each stage, and for the pipeline."""

from __future__ import annotations

from flows.pipeline import pipeline_flow, stage_flow
from flows.registry import stages

FLOWS = {name: stage_flow(stage) for name, stage in stages().items()} | {"pipeline": pipeline_flow()}
# A deployment's entrypoint names an attribute of a module, so each flow is one.
globals().update(FLOWS)
