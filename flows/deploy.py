"""Deployments: what a Prefect server offers to run, each with its form.

One for every stage (inputs by reference), one for every node of the presets (its settings filled in, its
inputs from that run), one for every preset as a whole, and `refresh`, which runs again every night, with its
own settings, what has been run under a preset's name: what has not changed is found in the store, so a night
without news costs seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect import Flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists

from flows import deployed
from flows.preset import load
from infra.config import plain
from infra.imports import ROOT

POOL = "headwater"
REFRESH_CRON = "0 3 * * *"
_LOST = "headwater: runs whose process vanished"
_ENDED = ("Completed", "Failed", "Cancelled", "Crashed")
# Three heartbeats of 30 s (flows.prefect_home).
_SILENCE = timedelta(seconds=90)


async def deploy(presets: Sequence[str]) -> list[str]:
    """Create or update every deployment on the server that this process is set to; returns their names.

    Needs a server that answers.
    """
    made, runs = [], []
    async with get_client() as client:
        await _pool(client)
        for name, flow in deployed.STAGES.items():
            made.append(await _deployment(client, name, flow, "stage", {}))
        for source in presets:
            preset = load(source)
            for node in preset.nodes.values():
                if node.stage.name in deployed.STAGES:
                    given = {"config": plain(node.config), "run": preset.name, "node": node.name}
                    flow = deployed.STAGES[node.stage.name]
                    made.append(
                        await _deployment(client, node.stage.name, flow, f"{preset.name}-{node.name}", given)
                    )
            made.append(await _pipeline(client, "pipeline", preset.name, {"preset": source}))
            runs.append(preset.name)
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron=REFRESH_CRON), slug="nightly")
        made.append(await _pipeline(client, "refresh", "nightly", {"runs": runs}, [schedule]))
        await _watch_lost_runs(client)
    return made


async def _pool(client: PrefectClient) -> None:
    with contextlib.suppress(ObjectAlreadyExists):
        await client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


async def _pipeline(
    client: PrefectClient,
    flow: str,
    name: str,
    parameters: dict[str, Any],
    schedules: list[DeploymentScheduleCreate] | None = None,
) -> str:
    """A deployment of the pipeline flow or of its refresh; a second run of it waits for the first."""
    return await _deployment(
        client,
        flow,
        deployed.FLOWS[flow],
        name,
        parameters,
        schedules=schedules or [],
        concurrency_limit=1,
        concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
    )


async def _deployment(
    client: PrefectClient,
    attribute: str,
    flow: Flow[Any, Any],
    name: str,
    parameters: dict[str, Any],
    **more: Any,
) -> str:
    identity = await client.create_deployment(
        flow_id=await client.create_flow(flow),
        name=name,
        entrypoint=f"flows.deployed:{attribute}",
        # Run from where the code lies: there is nothing to fetch.
        path=str(ROOT),
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
        work_pool_name=POOL,
        parameters=parameters,
        parameter_openapi_schema=flow.parameters.model_dump(),
        enforce_parameter_schema=True,
        description=flow.description,
        tags=["headwater"],
        **more,
    )
    if not more.get("schedules"):
        # An empty list leaves the schedules of an earlier deployment in place.
        for schedule in await client.read_deployment_schedules(identity):
            await client.delete_deployment_schedule(identity, schedule.id)
    return f"{flow.name}/{name}"


async def _watch_lost_runs(client: PrefectClient) -> None:
    """Have the server mark a run as crashed when its heartbeats stop before it has ended."""
    if await client.read_automations_by_name(_LOST):
        return
    trigger = EventTrigger(
        match={"prefect.resource.id": ["prefect.flow-run.*"]},
        for_each={"prefect.resource.id"},
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in _ENDED)},
        posture=Posture.Proactive,
        threshold=1,
        within=_SILENCE,
    )
    action = ChangeFlowRunState(
        state=StateType.CRASHED, name="Crashed", message="Its heartbeats have stopped."
    )
    await client.create_automation(
        AutomationCore(name=_LOST, enabled=True, trigger=trigger, actions=[action])
    )
