"""One node of a run in a worker process: start it, pass on what it says, end it, say what came out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from flows import leash
from flows.worker import Job
from infra.artifact import Artifact
from infra.config import StageConfig, plain
from infra.errors import DiskFull, disk_full_told
from infra.stage import Stage
from infra.store import Store

# (node, event): "start", "log", "progress", "cached", "done", "failed", "interrupted", "skipped".
Listen = Callable[[str, Mapping[str, Any]], None]

# A line of JSON from a worker may carry a long log message; asyncio's own limit is 64 KiB.
_LINE = 16 << 20
_LOG_KEPT = 1 << 20


@dataclass(frozen=True)
class Task:
    """A node that is ready to be built: its inputs exist."""

    node: str
    stage: Stage
    config: StageConfig
    inputs: Mapping[str, tuple[Artifact, ...]]
    # The run that the node belongs to, "" for a stage that is built on its own.
    run: str = ""
    folders: tuple[Path, ...] = ()
    threads: int = 1
    force: bool = False
    refresh: bool = False
    # POINT[:N] of infra.faults, for tests.
    fault: str = ""
    why: tuple[str, ...] = ()
    prefect: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a node ended: built, resumed, cached, given (taken as it is), failed, interrupted or skipped."""

    node: str
    stage: str
    status: str
    artifact: Artifact | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is an artifact to go on with."""
        return self.artifact is not None


async def execute(store: Store, task: Task, listen: Listen) -> Outcome:
    """Build one node in a process of its own and note in its run how it stands.

    Never raises for what goes wrong in the stage: the outcome says it. When cancelled, the worker's whole
    process tree is ended (SIGTERM, 25 s, SIGKILL) before the cancellation goes on; its work stays
    resumable.
    """
    _note(store, task, "running", listen)
    listen(task.node, {"event": "start", "stage": task.stage.name, "why": list(task.why)})
    try:
        with disk_full_told(store.home, f"starting {task.node}"):
            outcome = await _work(store, task, listen)
    except DiskFull as error:
        outcome = Outcome(task.node, task.stage.name, "failed", error=str(error))
    except asyncio.CancelledError:
        _note(store, task, "interrupted", listen)
        listen(task.node, {"event": "interrupted", "message": "stopped; the next try resumes"})
        raise
    _note(store, task, outcome.status, listen, outcome)
    if outcome.ok:
        listen(task.node, {"event": "done", "status": outcome.status, "seconds": outcome.seconds})
    else:
        listen(task.node, {"event": outcome.status, "message": outcome.error})
    return outcome


def _note(store: Store, task: Task, status: str, listen: Listen, outcome: Outcome | None = None) -> None:
    """Note in the run how the node stands; a full disk must not hide how it ended."""
    if not task.run:
        return
    details = {} if outcome is None else {"seconds": round(outcome.seconds, 3), "error": outcome.error}
    try:
        store.names.record_node(
            task.run,
            task.node,
            stage=task.stage.name,
            status=status,
            artifact=outcome.artifact if outcome else None,
            **details,
        )
    except DiskFull as error:
        message = f"that it is {status} is not noted in run {task.run}: {error}"
        listen(task.node, {"event": "log", "level": "warning", "message": message})


async def _work(store: Store, task: Task, listen: Listen) -> Outcome:
    folder = store.home / "logs" / (task.run or "single")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{task.node}.log"
    with _job_file(store, task, folder) as job, _appending(log) as errors:
        since = errors.tell()
        command = [sys.executable, "-P", "-m", "flows.worker", str(job)]
        process = await asyncio.create_subprocess_exec(
            *command + (["--fault", task.fault] if task.fault else []),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            limit=_LINE,
            # Iteration over a set of strings must not differ from one try to the next.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        try:
            last = await _listen(process, task, listen)
            code = await process.wait()
        finally:
            if process.returncode is None:
                await _end(process)
            leash.signal_group(process.pid, signal.SIGKILL)  # what the stage may have left running
    return _outcome(store, task, last, code, leash.tail(log, since), log)


@contextlib.contextmanager
def _job_file(store: Store, task: Task, folder: Path) -> Iterator[Path]:
    """The job on disk for as long as the worker lives; of its own name, for two runs may build one node."""
    job = Job(
        home=str(store.home),
        stage=task.stage.name,
        config={**plain(task.config), "threads": task.threads},
        inputs={role: [one.ref for one in artifacts] for role, artifacts in task.inputs.items()},
        folders=[str(one) for one in task.folders],
        threads=task.threads,
        force=task.force,
        refresh=task.refresh,
        parent=os.getpid(),
        prefect=dict(task.prefect),
    )
    handle, name = tempfile.mkstemp(prefix=f"{task.node}-", suffix=".job.json", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(job), file, indent=2)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _appending(log: Path) -> Iterator[BinaryIO]:
    """What the worker and its libraries print, kept between tries but not for ever."""
    if log.exists() and log.stat().st_size > _LOG_KEPT:
        log.unlink()
    with log.open("ab") as file:
        yield file


async def _listen(process: asyncio.subprocess.Process, task: Task, listen: Listen) -> dict[str, Any]:
    """Pass on the worker's events until it closes its end; returns the one that says how it ended."""
    last: dict[str, Any] = {}
    if process.stdout is None:
        return last
    async for line in process.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            event = {"event": "log", "level": "info", "message": line.decode("utf-8", "replace").rstrip()}
        if event["event"] in ("done", "error", "interrupted"):
            last = event
        else:
            listen(task.node, event)
    return last


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a worker and its whole group; the kill comes even if this is cancelled once more."""
    leash.signal_group(process.pid, signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), leash.GRACE)
    except TimeoutError:
        pass
    finally:
        leash.signal_group(process.pid, signal.SIGKILL)
    await process.wait()


def _outcome(
    store: Store, task: Task, last: Mapping[str, Any], code: int, printed: str, log: Path
) -> Outcome:
    quote = f"\nthe end of {log}:\n{printed}" if printed else ""

    def ended(status: str, error: str) -> Outcome:
        return Outcome(task.node, task.stage.name, status, error=error)

    kind = last.get("event", "")
    if kind == "done":
        artifact = store.resolve(last["ref"])
        return Outcome(task.node, task.stage.name, last["status"], artifact, last["seconds"])
    if kind == "interrupted":
        return ended("interrupted", last["message"])
    if kind == "error":
        return ended("failed", last["message"] + (quote if last.get("crash") else ""))
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory, or by hand)" if name == "SIGKILL" else ""
        return ended("failed", f"its process was ended by {name}{hint}; run again to resume" + quote)
    return ended("failed", f"its process ended with code {code} without saying why" + quote)
