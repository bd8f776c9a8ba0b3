"""Interruptions: a killed worker, a killed command, Ctrl-C, two commands at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.store import Store
from tests.flows.conftest import TOY, digests, environment, statuses

Toy = Callable[..., Any]
# Long enough to be hit in the middle, short enough to be waited for.
SLOW = "train.pause=0.3"


@pytest.fixture
def started(home: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `headwater run` on the toy pipeline in the background; whatever is left is ended."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "flows.cli", "run", "--preset", str(TOY), "--no-prefect"]
        process = subprocess.Popen(
            [*command, *arguments],
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell without job control starts what it puts in the background with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        processes.append(process)
        return process

    try:
        yield start
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def said(process: subprocess.Popen[str], text: str) -> None:
    """Wait until the command prints a line with `text` on its standard error."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"{text!r} was never printed: {''.join(seen)}")


def gone(pid: int, within: float = 15.0) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "point", ["payload.during_write", "checkpoint.before", "checkpoint.after:3", "publish.before_rename"]
)
def test_a_worker_killed_at_a_fault_point_is_told_and_resumed_to_the_same_digest(
    toy: Toy, tmp_path: Path, point: str
) -> None:
    result, _ = toy("defaults.seed=2", stop=("train",), faults={"train": point})
    assert statuses(result)["train"] == "failed"
    assert "SIGKILL" in result.outcomes["train"].error
    assert "run again to resume" in result.outcomes["train"].error
    resumed, _ = toy("defaults.seed=2", stop=("train",))
    assert statuses(resumed)["train"] in ("resumed", "built")
    if point == "checkpoint.after:3":
        assert statuses(resumed)["train"] == "resumed"
    whole, _ = toy("defaults.seed=2", start=("train",), stop=("train",), force=True)
    assert digests(whole)["train"] == digests(resumed)["train"]


def test_ctrl_c_stops_the_workers_says_how_to_go_on_and_resumes(
    started: Callable[..., subprocess.Popen[str]], store: Store
) -> None:
    process = started("--set", SLOW)
    said(process, "train     25%")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command resumes it" in errors
    assert "Traceback" not in errors
    assert store.names.run("toy")["nodes"]["train"]["status"] == "interrupted"
    (work,) = [path for path in (store.home / "work").iterdir() if (path / "scratch" / "state.json").exists()]
    again = started("--set", SLOW)
    out, errors = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "train    resumed" in out
    assert not work.exists()


def test_when_the_command_is_killed_its_workers_end_too_and_the_next_resumes(
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    process = started("--set", "train.pause=1.5")
    said(process, "train     25%")
    workers = psutil.Process(process.pid).children()
    assert workers
    process.kill()
    process.wait()
    assert all(gone(worker.pid) for worker in workers)
    again = started()
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "train    resumed" in out


def test_two_commands_at_once_build_each_artifact_once(
    started: Callable[..., subprocess.Popen[str]], store: Store
) -> None:
    one, two = started("--set", SLOW), started("--set", SLOW, "--run", "other")
    outputs = [process.communicate(timeout=90) for process in (one, two)]
    assert [process.returncode for process in (one, two)] == [0, 0], outputs
    assert len(store.refs()) == 5
    assert all(artifact.record.attempt == 1 for artifact in store.artifacts())
    assert store.resolve("toy/last").ref == store.resolve("other/last").ref


def test_a_failure_says_how_to_go_on(started: Callable[..., subprocess.Popen[str]]) -> None:
    process = started("--set", "left.crash=error")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "left failed: source: the numbers have run out" in errors
    assert f"headwater run --preset {TOY} --set left.crash=error --no-prefect" in errors


# The leash itself


def test_a_leashed_program_ends_with_whoever_started_it(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom flows import leash\n"
        f"child = leash.start(['sleep', '60'], {{}}, pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until = time.monotonic() + 10
        while psutil.Process(child).name() != "sleep" and time.monotonic() < until:
            time.sleep(0.02)
        assert os.getsid(child) == child
        parent.kill()
        assert gone(child)
    finally:
        parent.kill()
        parent.communicate()


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    from flows import leash

    lines = (
        "import signal, time",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "print('on', flush=True)",
    )
    code = "\n".join([*lines, "time.sleep(60)"])
    log = tmp_path / "log"
    process = leash.start([sys.executable, "-c", code], {}, log)
    try:
        until = time.monotonic() + 10
        while "on" not in leash.tail(log) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        leash.stop(process, grace=0.3)
    assert process.returncode == -signal.SIGKILL
