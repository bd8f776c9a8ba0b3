"""What a run made, gathered from records: the one source of the terminal's summary and of report.html.

Figures come from the records' metrics and from the artifacts' JSON and JSONL files; nothing is parsed out
of text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.gain import gains
from infra import lineage
from infra.artifact import Artifact
from infra.errors import HeadwaterError, StoreError
from infra.names import utc_now
from infra.store import Store

# Curves worth a line in the terminal, where a log has them.
_WATCHED = ("loss", "watched_loss", "reward", "correct", "accuracy")
_FIGURES = 4
_SAMPLES = 6


@dataclass(frozen=True)
class Row:
    """One node in the table of stages."""

    node: str
    stage: str
    status: str
    artifact: Artifact | None
    seconds: float
    figures: Mapping[str, Any]
    error: str = ""
    # Left by an earlier run of the same name, which this one (of a part) did not look at.
    earlier: bool = False


@dataclass(frozen=True)
class Curve:
    """One figure over the course of a stage: `x` is "tokens" or "step"."""

    node: str
    name: str
    x: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Sample:
    """An answer that an evaluation kept to be read."""

    node: str
    prompt: str
    system: str
    answer: str
    expected: str
    correct: bool


@dataclass(frozen=True)
class Report:
    """Everything that is told about a run."""

    run: str
    preset: str
    description: str
    made: str
    seconds: float
    home: Path
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    samples: tuple[Sample, ...]
    gates: tuple[Mapping[str, Any], ...]
    promotion: str
    tree: str
    # What reinforcement learning brought, a paragraph each.
    gains: tuple[str, ...] = ()
    # Why the page could not be written and what to do, "" when it lies there.
    unwritten: str = ""

    @property
    def page(self) -> Path:
        """Where the HTML page lies."""
        return self.home / "reports" / self.run / "report.html"


def gather(store: Store, run: str, more: Mapping[str, Any] | None = None) -> Report:
    """The report of a run as the store has it now; StoreError when there is no such run.

    more: what is known of the run as a whole and could not be noted in it.
    """
    document = store.names.require_run(run)
    info = {**document["info"], **(more or {})}
    order = [name for name in info.get("order", []) if name in document["nodes"]]
    order += [name for name in sorted(document["nodes"]) if name not in order]
    rows = [_row(store, name, document["nodes"][name], info) for name in order]
    artifacts = [(row.node, row.artifact) for row in rows if row.artifact is not None]
    now = {row.node: row.artifact for row in rows if row.artifact is not None and not row.earlier}
    root = now.get(info.get("root", "")) or (list(now.values())[-1] if now else None)
    return Report(
        run=run,
        preset=info.get("name", run),
        description=info.get("description", ""),
        made=utc_now(),
        seconds=float(info.get("seconds", 0.0)),
        home=store.home,
        rows=tuple(rows),
        curves=tuple(curve for node, one in artifacts for curve in _curves(node, one)),
        samples=tuple(sample for node, one in artifacts for sample in _samples(node, one)),
        gates=tuple(info.get("gates", [])),
        promotion=info.get("promotion", ""),
        tree=lineage.to_text(lineage.back(store, root)) if root else "",
        gains=gains(artifact for _, artifact in artifacts),
    )


def _row(store: Store, name: str, entry: Mapping[str, Any], info: Mapping[str, Any]) -> Row:
    artifact = None
    if entry["artifact"]:
        try:
            artifact = store.resolve(entry["artifact"])
        except StoreError:
            artifact = None
    metrics = artifact.metrics if artifact else {}
    named = [key for key in info.get("figures", {}).get(name, []) if key in metrics]
    keys = named or [key for key, value in metrics.items() if not isinstance(value, str)]
    details = entry.get("details", {})
    statuses = info.get("statuses", {})
    earlier = bool(statuses) and name not in statuses
    return Row(
        node=name,
        stage=entry["stage"],
        status="earlier run" if earlier else statuses.get(name, entry["status"]),
        artifact=artifact,
        seconds=float(details.get("seconds") or 0.0),
        figures={key: metrics[key] for key in keys[:_FIGURES]},
        error="" if earlier else str(details.get("error", "")),
        earlier=earlier,
    )


def _curves(node: str, artifact: Artifact) -> list[Curve]:
    curves = []
    for name in artifact.names("logs/*.jsonl"):
        lines = read_jsonl(artifact.path / name)
        for key in _WATCHED:
            having = [line for line in lines if _number(line.get(key))]
            x = next(
                (one for one in ("tokens", "step") if all(_number(line.get(one)) for line in having)), ""
            )
            if having and x:
                curves.append(Curve(node, key, x, tuple((line[x], line[key]) for line in having)))
    return curves


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that hold an object; a torn or foreign line is left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _samples(node: str, artifact: Artifact) -> list[Sample]:
    if artifact.stage != "evaluate" or not artifact.names("samples.json"):
        return []
    try:
        listed = artifact.json("samples.json")
    except HeadwaterError:
        return []
    return [
        Sample(
            node=node,
            prompt=str(one.get("prompt", "")),
            system=str(one.get("system", "")),
            answer=str(one.get("answer", "")),
            expected=str(one.get("expected", "")),
            correct=bool(one.get("correct", False)),
        )
        for one in listed[:_SAMPLES]
    ]
