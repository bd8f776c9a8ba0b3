"""One node, built in a process of its own: `python -m flows.worker JOB.json [--fault POINT[:N]]`.

A stage gets a fresh process so that its memory goes when it ends, its threads are set before any library
looks, and a crash or a kill takes nothing else with it. The process says what it does as JSON lines on its
standard output; whatever libraries print goes to standard error, which the runner keeps in a file.

Events: {"event": "log"|"progress"|"done"|"error"|"interrupted", ...}.
Exit codes: 0 done, 1 error, 130 interrupted (the work folder stays, and the next try resumes from it).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flows import leash

Emit = Callable[[Mapping[str, Any]], None]

# Characters of one text of an event, at both ends together: nobody reads more, and the runner takes lines
# of a certain length only.
_LONGEST = 64_000

# Read by OpenMP, MKL, OpenBLAS, numba and the Rust libraries when they are loaded, so set before that.
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker process is asked to build; plain values only, so that it travels as JSON."""

    home: str
    stage: str
    # The whole config, identity and placement, as plain values.
    config: Mapping[str, Any]
    # Role -> references `stage@id`.
    inputs: Mapping[str, Sequence[str]]
    # Folders with more stage files than Headwater's own.
    folders: Sequence[str] = ()
    threads: int = 1
    force: bool = False
    refresh: bool = False
    # The process to end with; 0 for a worker started by hand.
    parent: int = 0
    prefect: Mapping[str, str] = dataclasses.field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the node that the job file describes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.worker", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument(
        "--fault", default="", metavar="POINT[:N]", help="die at a named point (infra.faults)"
    )
    given = parser.parse_args(arguments)
    job = Job(**json.loads(given.job.read_text(encoding="utf-8")))
    if job.parent:
        # Made for this worker alone; a runner that is killed cannot tidy up after itself.
        given.job.unlink(missing_ok=True)
        # `build` turns the SIGTERM that this may bring into a tidy stop; before it there is nothing to lose.
        leash.leash(job.parent)
    emit = _channel()
    _set_threads(job.threads)
    try:
        _build(job, given.fault, emit)
    except KeyboardInterrupt:
        emit({"event": "interrupted", "message": "interrupted; the next try resumes"})
        return 130
    except Exception as error:
        return _report(error, emit)
    return 0


def _build(job: Job, fault: str, emit: Emit) -> None:
    # Imported here: the threads are set first, and a wrong job file costs nothing.
    from flows import registry
    from infra import build, config, faults, store

    stage = registry.stage(job.stage, [Path(folder) for folder in job.folders])
    parsed = config.parse(stage.config, job.config, job.stage)
    shop = store.open_store(job.home)
    inputs = {role: [shop.resolve(ref) for ref in refs] for role, refs in job.inputs.items()}
    if fault:
        faults.arm_spec(fault)
    result = build.build(
        shop,
        stage,
        parsed,
        inputs,
        force=job.force,
        refresh=job.refresh,
        prefect=dict(job.prefect) or None,
        events=emit,
    )
    emit(
        {
            "event": "done",
            "ref": result.artifact.ref,
            "status": result.status,
            "seconds": round(result.seconds, 3),
        }
    )


def _report(error: Exception, emit: Emit) -> int:
    from infra.errors import HeadwaterError

    if isinstance(error, HeadwaterError):
        kind = "interrupted" if error.exit_code == 130 else "error"
        emit({"event": kind, "kind": type(error).__name__, "message": str(error)})
        return error.exit_code
    traceback.print_exc()  # for the log file; the runner shows its end
    emit(
        {
            "event": "error",
            "kind": type(error).__name__,
            "message": f"{type(error).__name__}: {error}",
            "crash": True,
        }
    )
    return 1


def _channel() -> Emit:
    """Keep the real standard output for events, and send what anything else prints to standard error."""
    sys.stdout.flush()
    stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: Mapping[str, Any]) -> None:
        line = json.dumps({name: _fit(value) for name, value in event.items()}, default=str)
        with lock:
            try:
                stream.write(line + "\n")
                stream.flush()
            except BrokenPipeError:
                # Whoever listened is gone; its death also sends SIGTERM, which ends the work in good order.
                pass

    return emit


def _fit(value: Any) -> Any:
    """A text short enough to pass on, saying so where it was cut; what is no Unicode is spelt out."""
    if not isinstance(value, str):
        return value
    half, cut = _LONGEST // 2, len(value) - _LONGEST
    if cut > 0:
        value = f"{value[:half]} ... ({cut:,} characters cut) ... {value[-half:]}"
    return value.encode("utf-8", "backslashreplace").decode()


def _set_threads(threads: int) -> None:
    for name in _THREADS:
        os.environ[name] = str(max(1, threads))
    # Threads that wait by spinning take the cores from the other workers.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = "0"


if __name__ == "__main__":
    code = main()
    if leash.orphaned():
        leash.kill_own_group()  # whatever the stage itself started must not stay behind
    sys.exit(code)
