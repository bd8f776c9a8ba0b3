"""A process that has torch loaded and forks one real process per job, so that a test can kill many quickly.

`python -m tests.infra.forge` reads JSON lines on stdin: {"start": job} answers {"pid"}, {"wait": pid} answers
{"signal", "code"}. A job builds one toy artifact and writes what came of it to the file job["result"].
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def work(job: dict[str, Any]) -> None:
    """Do one job in this process."""
    from infra import faults
    from infra.build import build
    from infra.config import parse
    from infra.errors import HeadwaterError
    from infra.store import open_store
    from tests.infra.toys import STAGES

    # A test run started in the background would hand down an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    result: dict[str, Any] = {}
    try:
        store = open_store(job["home"])
        stage = STAGES[job["stage"]]
        inputs = {role: [store.resolve(ref) for ref in refs] for role, refs in job.get("inputs", {}).items()}
        if job.get("fault"):
            faults.arm_spec(job["fault"])
        config = parse(stage.config, job.get("config", {}))
        log = Path(job["result"] + ".log")

        def events(event: dict[str, Any]) -> None:
            with log.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(event) + "\n")

        built = build(store, stage, config, inputs, events=events, force=job.get("force", False))
        store.names.record_node("run", "node", stage=stage.name, status=built.status, artifact=built.artifact)
        store.promote(built.artifact.ref, "best")
        result = {"ref": built.artifact.ref, "digest": built.artifact.digest, "status": built.status}
    except HeadwaterError as error:
        result = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    """Serve jobs until stdin closes."""
    import safetensors.torch  # noqa: F401  each fork has it loaded
    import torch

    from infra.imports import code_state
    from tests.infra.toys import train

    torch.set_num_threads(1)
    code_state(train)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    work(request["start"])
                    code = 0
                finally:
                    os._exit(code)
            answer = {"pid": pid}
        else:
            status = os.waitpid(request["wait"], 0)[1]
            answer = {
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "code": os.WEXITSTATUS(status),
            }
        print(json.dumps(answer), flush=True)


class Job:
    """A running job."""

    def __init__(self, forge: Forge, pid: int, result: Path) -> None:
        self.forge, self.pid, self.result = forge, pid, result

    def kill(self, number: int) -> None:
        """Send a signal, if the process is still there (it is a zombie until waited for)."""
        os.kill(self.pid, number)

    def events(self) -> list[dict[str, Any]]:
        """What the build has said so far."""
        log = Path(f"{self.result}.log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def until(self, text: str) -> None:
        """Wait for the first event whose kind or message starts with a text."""
        end = time.monotonic() + 60
        while not any(
            event["event"] == text or event.get("message", "").startswith(text) for event in self.events()
        ):
            assert time.monotonic() < end, f"no event {text!r} within 60 s"
            time.sleep(0.005)

    def wait(self) -> dict[str, Any]:
        """Wait for the end: the job's result, with the `signal` and exit `code` it ended by."""
        end = self.forge.ask({"wait": self.pid})
        written = json.loads(self.result.read_text()) if self.result.exists() else {}
        return {**written, **end}


class Forge:
    """The test's end of the forge process."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._count = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request, return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, home: Path, stage: str, **job: Any) -> Job:
        """Start building a toy stage in a process of its own."""
        self._count += 1
        result = self._folder / f"result-{self._count}.json"
        pid = self.ask({"start": {"home": str(home), "stage": stage, "result": str(result), **job}})["pid"]
        return Job(self, pid, result)

    def run(self, home: Path, stage: str, **job: Any) -> dict[str, Any]:
        """Build and wait."""
        return self.start(home, stage, **job).wait()


@contextmanager
def forge(folder: Path) -> Iterator[Forge]:
    """Start the forge; its processes end with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.infra.forge"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Forge(process, folder)
        assert process.stdin is not None
        process.stdin.close()


if __name__ == "__main__":
    main()
