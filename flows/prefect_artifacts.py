"""What a flow leaves in Prefect's pages: a table of figures, the plots, and the lineage as a diagram.

They are a view. The records are the truth, so a server that is away costs a warning and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from prefect.artifacts import acreate_image_artifact, acreate_markdown_artifact, acreate_table_artifact
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL

from flows import server
from flows.report_page import duration, number
from flows.runner import Result
from infra import lineage
from infra.artifact import Artifact
from infra.store import Store

# Larger pictures would weigh down the server's database.
_LARGEST_PLOT = 1 << 20


def key(*parts: str) -> str:
    """A key as Prefect allows it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


async def publish_node(store: Store, run: str, node: str, artifact: Artifact, status: str) -> None:
    """The figures, plots and lineage of one artifact."""
    record = artifact.record
    rows: list[dict[str, Any]] = [
        {"figure": "artifact", "value": artifact.ref},
        {"figure": "status", "value": status},
        {"figure": "time", "value": duration(float(record.timings.get("seconds", 0.0)))},
        {"figure": "digest", "value": artifact.digest[:16]},
    ]
    rows += [{"figure": name, "value": number(value)} for name, value in artifact.metrics.items()]
    rows += [{"figure": f"input {one.role}", "value": one.ref} for one in record.inputs]
    rows += [
        {"figure": f"config {name}", "value": json.dumps(value, ensure_ascii=False)}
        for name, value in record.config["identity"].items()
    ]
    await _table(key(run, node, "summary"), rows, f"{node} of run {run}")
    for name in artifact.names("plots/*.png"):
        path = artifact.path / name
        if path.is_file() and path.stat().st_size <= _LARGEST_PLOT:
            picture = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            stem = name.removeprefix("plots/").removesuffix(".png")
            await _kept(acreate_image_artifact(picture, key(run, node, stem), f"{node}: {stem}"))
    await publish_lineage(store, key(run, node, "lineage"), artifact)


async def publish_lineage(store: Store, name: str, artifact: Artifact) -> None:
    """Where an artifact came from, as a mermaid diagram."""
    diagram = lineage.to_mermaid(lineage.back(store, artifact))
    text = f"`{artifact.ref}` and all it was built from\n\n```mermaid\n{diagram}```\n"
    await _kept(acreate_markdown_artifact(text, name, f"Lineage of {artifact.ref}"))


async def publish_run(store: Store, result: Result, gates: Sequence[Mapping[str, Any]]) -> None:
    """The table of stages, the gates, and the lineage of the last artifact."""
    rows = [
        {
            "node": name,
            "stage": one.stage,
            "status": one.status,
            "time": duration(one.seconds),
            "artifact": one.artifact.ref if one.artifact else "",
        }
        for name, one in result.outcomes.items()
    ]
    await _table(key(result.run, "stages"), rows, f"Run {result.run} of preset {result.preset.name}")
    if gates:
        listed = [
            {name: number(value) for name, value in gate.items() if name != "problem"} for gate in gates
        ]
        await _table(key(result.run, "gates"), listed, "What the preset claims")
    root = result.preset.promote.node if result.preset.promote else list(result.outcomes)[-1]
    outcome = result.outcomes.get(root)
    if outcome is not None and outcome.artifact is not None:
        await publish_lineage(store, key(result.run, "lineage"), outcome.artifact)


async def _table(name: str, rows: list[dict[str, Any]], description: str) -> None:
    await _kept(acreate_table_artifact(rows, name, description))


async def _kept(making: Coroutine[Any, Any, Any]) -> None:
    """Make an artifact; a server that does not take it is worth a warning, not a failed stage."""
    if not await reachable():
        making.close()  # the client would try for a long while
        return
    try:
        await making
    except Exception as error:  # whatever the client raises, the work is done and recorded
        get_run_logger().warning("Prefect did not take an artifact: %s", error)


async def reachable() -> bool:
    """Whether the server that this process records in still answers; it may be busy for a while."""
    return await asyncio.to_thread(server.healthy, PREFECT_API_URL.value() or "", 15.0)
