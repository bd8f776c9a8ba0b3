"""A home of its own for each test, and the toy pipeline."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flows.execute import Outcome, Task
from flows.preset import load
from flows.runner import Options, Pipeline, Result
from infra import build
from infra.store import Store

TOY = Path(__file__).parent / "toy" / "pipeline.yaml"
Event = tuple[str, Mapping[str, Any]]


def environment(home: Path) -> dict[str, str]:
    """The environment of a user who has set nothing but the home."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "HEADWATER"))
    }
    return {**kept, "HEADWATER_HOME": str(home), "PYTHONPATH": ""}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("HEADWATER_HOME", str(path))
    return path


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home)


@pytest.fixture
def headwater(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the `headwater` command as a user would."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "flows.cli", *arguments],
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def toy(store: Store) -> Callable[..., tuple[Result, list[Event]]]:
    """Run the toy pipeline in worker processes; returns the result and all events."""

    def run(*sets: str, name: str = "", **options: Any) -> tuple[Result, list[Event]]:
        events: list[Event] = []
        pipeline = Pipeline(
            store,
            load(str(TOY), sets),
            name,
            Options(**options),
            lambda node, event: events.append((node, event)),
        )
        return asyncio.run(pipeline.execute()), events

    return run


@pytest.fixture
def quick(store: Store) -> Callable[..., tuple[Result, list[Event]]]:
    """Like `toy`, but built in this process: for tests of what is built, not of how."""

    def run(*sets: str, name: str = "", **options: Any) -> tuple[Result, list[Event]]:
        events: list[Event] = []
        pipeline = Pipeline(
            store,
            load(str(TOY), sets),
            name,
            Options(**options),
            lambda node, event: events.append((node, event)),
        )

        async def make(task: Task) -> Outcome:
            events.append((task.node, {"event": "start", "why": list(task.why)}))
            made = build.build(store, task.stage, task.config, task.inputs, force=task.force)
            noted = {"stage": task.stage.name, "status": made.status, "artifact": made.artifact}
            store.names.record_node(pipeline.run, task.node, **noted)
            return Outcome(task.node, task.stage.name, made.status, made.artifact, made.seconds)

        return asyncio.run(pipeline.execute(make)), events

    return run


def statuses(result: Result) -> dict[str, str]:
    """Node -> how it ended."""
    return {name: outcome.status for name, outcome in result.outcomes.items()}


def digests(result: Result) -> dict[str, str]:
    """Node -> payload digest."""
    return {name: one.artifact.digest for name, one in result.outcomes.items() if one.artifact}
