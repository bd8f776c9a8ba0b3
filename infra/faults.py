"""Fault injection: named instants at which a test can make the process die as if the power went.

A point costs one comparison while nothing is armed. Points are armed in the process that is to die, by an
explicit call or command-line argument, never by an environment variable.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from infra.errors import ConfigError, nearest

POINTS: tuple[str, ...] = (
    # Each file that goes into a payload through infra.files.
    "payload.before_write",
    "payload.during_write",
    "payload.after_write",
    # Checkpoints under scratch: a tensor file, then the marker that makes it count.
    "checkpoint.before",
    "checkpoint.during",
    "checkpoint.before_marker",
    "checkpoint.after",
    # Publishing: record.json into the payload, fsync, one rename, then the scratch folder goes.
    "publish.before_record",
    "publish.during_record",
    "publish.after_record",
    "publish.before_rename",
    "publish.after_rename",
    "publish.after_cleanup",
    # Promoted names and run files.
    "names.before_write",
    "names.during_write",
    "names.after_write",
)

# The armed point and how many hits are left before it fires. One per process, by nature: it ends the process.
_armed: dict[str, int] = {}


def arm(point: str, hit: int = 1) -> None:
    """Make the `hit`-th arrival at `point` kill this process with SIGKILL.

    Raises ConfigError for a point that is not registered.
    """
    if point not in POINTS:
        raise ConfigError(f"unknown fault point {point!r}; {nearest(point, POINTS)}")
    if hit < 1:
        raise ConfigError(f"fault point {point}: the hit must be 1 or more, not {hit}")
    _armed[point] = hit


def arm_spec(spec: str) -> None:
    """Arm `POINT` or `POINT:N` as given on a command line."""
    point, _, hit = spec.partition(":")
    if hit and not hit.isdigit():
        raise ConfigError(f"fault {spec!r}: expected POINT or POINT:N with N a whole number")
    arm(point, int(hit or 1))


def disarm() -> None:
    """Forget whatever is armed."""
    _armed.clear()


def _fires(point: str) -> bool:
    if point not in POINTS:
        raise ConfigError(f"unregistered fault point {point!r}: add it to infra.faults.POINTS")
    if point not in _armed:
        return False
    _armed[point] -= 1
    return _armed[point] == 0


def fault(point: str) -> None:
    """Die here by SIGKILL if this point is armed and its hit has come; otherwise do nothing."""
    if _armed and _fires(point):
        os.kill(os.getpid(), signal.SIGKILL)


def torn(point: str, path: Path) -> None:
    """Like `fault`, but leave only the first half of the file at `path` behind: a write cut in the middle.

    For files that a library wrote in one call, where no instant inside the write can be reached.
    """
    if _armed and _fires(point):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
