"""The nightly refresh: the runs that exist are run again as they were, and nothing else is ever begun."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from prefect import Flow, flow
from prefect.logging import get_run_logger

from flows.pipeline import pipeline_flow
from infra.errors import HeadwaterError
from infra.store import Store, open_store

Say = Callable[[str], None]


def refresh_flow() -> Flow[Any, Any]:
    """The flow that runs a list of runs again. Settings and nodes are those that each run recorded."""
    pipeline = pipeline_flow(yielding=True)

    async def again(**given: Any) -> Any:
        return await pipeline(**given)

    @flow(name="refresh", description="Run again what was run before; what has not changed is reused.")
    async def refresh(runs: list[str] = []) -> list[str]:  # noqa: B006 - a form needs the plain default
        """Run runs again.

        Args:
            runs: Names of runs; those that do not exist are left alone
        """
        return await refresh_runs(open_store(), runs, again, get_run_logger().info)

    return refresh


async def refresh_runs(
    store: Store, runs: Sequence[str], again: Callable[..., Awaitable[Any]], say: Say
) -> list[str]:
    """Call `again` with what each run was made from; returns the runs that were there.

    Raises HeadwaterError naming the runs that failed, after all have had their turn.
    """
    found, failed = [], []
    for name in runs:
        document = store.names.run(name)
        made = _made(document) if document else []
        if not document or not made:
            say(f"{name} has never been run in {store.home}: nothing to refresh")
            continue
        found.append(name)
        info = document["info"]
        try:
            await again(preset=info["preset"], run=name, settings=list(info.get("sets", [])), to_nodes=made)
        except HeadwaterError as error:
            say(f"{name} was not refreshed: {error}")
            failed.append(f"{name}: {error}")
    if failed:
        raise HeadwaterError("; ".join(failed))
    return found


def _made(document: Mapping[str, Any]) -> list[str]:
    """The nodes of a run that have come to something; a run of a part is refreshed in that part."""
    if "preset" not in document["info"]:
        return []
    order = document["info"].get("order", [])
    return [name for name in order if document["nodes"].get(name, {}).get("artifact")]
