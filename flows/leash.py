"""Processes that never outlive what started them.

A pipeline that is killed must not leave a training run burning the machine. Every process that Headwater
starts gets a session of its own, so that its whole tree can be ended at once, and asks the kernel (Linux)
for a SIGTERM when its parent dies; a thread that watches the parent covers other systems, and the children
of a child that does not listen.

Run as `python -m flows.leash PARENT_PID COMMAND...` it becomes COMMAND, leashed: for programs that are not
ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Seconds between asking a process to end and killing it. Prefect gives a cancelled flow 30 before it kills.
GRACE = 25.0
_PR_SET_PDEATHSIG = 1
# The parent that this process is tied to; a process has one by nature.
_parents: list[int] = []


def leash(parent: int, grace: float = GRACE) -> None:
    """Tie this process to `parent`: SIGTERM when it ends, then SIGKILL to the whole group."""
    told = die_with_parent(parent)
    _parents.append(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        if not told:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        kill_own_group()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def orphaned() -> bool:
    """Whether the parent that `leash` tied this process to has ended."""
    return any(os.getppid() != parent for parent in _parents)


def die_with_parent(parent: int) -> bool:
    """Have the kernel send this process SIGTERM when `parent` ends; False where it cannot (other than Linux).

    Exits at once if the parent has ended already.
    """
    told = False
    with contextlib.suppress(OSError, AttributeError):
        told = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) == 0
    if os.getppid() != parent:
        raise SystemExit(130)
    return told


def kill_own_group() -> None:
    """SIGKILL to the group of this process, itself included, where the group is its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def signal_group(leader: int, number: signal.Signals) -> bool:
    """Send a signal to the group that `leader` leads; False when nobody is left in it."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True


def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a program leashed, in a session of its own, its output going to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.leash", str(os.getpid()), *command],
            env={**os.environ, **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End a started program and everything in its group: SIGTERM, `grace` seconds, SIGKILL."""
    if process.poll() is None:
        signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    signal_group(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, since: int = 0, lines: int = 40) -> str:
    """The last lines of a log file, of what was written after byte `since`, for an error message."""
    try:
        with log.open("rb") as file:
            file.seek(since)
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def main(arguments: Sequence[str]) -> None:
    """Become the command in `arguments[1:]`, leashed to the process `arguments[0]`."""
    die_with_parent(int(arguments[0]))
    # A shell's background job ignores these, and what is ignored stays so in the program that is started.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execvp(arguments[1], list(arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
