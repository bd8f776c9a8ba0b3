"""The worker process: a clean channel, its threads, its exit codes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.preset import load
from flows.runner import Pipeline
from flows.worker import Job
from infra.store import Store
from tests.flows.conftest import TOY, environment

SHOW_THREADS = '''
"""Show what the process was given."""
from infra.config import StageConfig
from infra.stage import Stage

class Config(StageConfig):
    """Nothing."""

def run(config, context):
    import os, sys
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONHASHSEED"]
    seen = {name: os.environ.get(name, "") for name in names}
    context.write_json("seen.json", {**seen, "torch": "torch" in sys.modules})

STAGE = Stage("show", 1, Config, run)
'''


def work(tmp_path: Path, home: Path, *arguments: str, **job: Any) -> subprocess.CompletedProcess[str]:
    """Run a worker on a job by hand, as one does to find out what went wrong."""
    path = tmp_path / "job.json"
    given: dict[str, Any] = {"config": {}, "inputs": {}, "folders": [str(TOY.parent)], **job}
    path.write_text(json.dumps(dataclasses.asdict(Job(home=str(home), **given))))
    return subprocess.run(
        [sys.executable, "-m", "flows.worker", str(path), *arguments],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_events_alone_are_on_standard_output(tmp_path: Path, home: Path) -> None:
    done = work(tmp_path, home, stage="source", config={"note": "ünïcode\nand a line", "count": 2})
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "done"
    assert events[-1]["status"] == "built"
    assert Store(home).resolve(events[-1]["ref"]).metrics["count"] == 2
    assert "ünïcode\nand a line" in [event.get("message") for event in events]
    assert "a library that prints" in done.stderr
    assert "a library that prints" not in done.stdout


def test_threads_are_set_before_anything_looks(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "stages"
    folder.mkdir()
    (folder / "show.py").write_text(SHOW_THREADS)
    done = work(tmp_path, home, stage="show", folders=[str(folder)], threads=3)
    ref = json.loads(done.stdout.splitlines()[-1])["ref"]
    seen = Store(home).resolve(ref).json("seen.json")
    assert seen["OMP_NUM_THREADS"] == seen["MKL_NUM_THREADS"] == seen["RAYON_NUM_THREADS"] == "3"
    assert seen["OMP_WAIT_POLICY"] == "PASSIVE"
    assert seen["torch"] is False


@pytest.mark.parametrize(
    ("job", "code", "kind", "message"),
    [
        ({"stage": "source", "config": {"crash": "error"}}, 1, "error", "the numbers have run out"),
        (
            {"stage": "source", "config": {"crash": "exception"}},
            1,
            "error",
            "ValueError: an unforeseen number",
        ),
        ({"stage": "source", "config": {"cuont": 1}}, 1, "error", "source.cuont: no such field"),
        ({"stage": "sorce"}, 1, "error", "no stage named 'sorce'"),
        ({"stage": "slow", "inputs": {"numbers": ["slow@00"]}}, 1, "error", "slow@00"),
    ],
)
def test_errors_are_events(
    tmp_path: Path, home: Path, job: dict[str, Any], code: int, kind: str, message: str
) -> None:
    done = work(tmp_path, home, **job)
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event["event"]) == (code, kind)
    assert message in event["message"]
    assert ("Traceback" in done.stderr) is bool(event.get("crash"))


def test_an_unknown_fault_point_is_refused(tmp_path: Path, home: Path) -> None:
    done = work(tmp_path, home, "--fault", "payload.befor_write", stage="source")
    assert done.returncode == 1
    assert "payload.before_write" in json.loads(done.stdout.splitlines()[-1])["message"]


def test_a_fault_point_kills(tmp_path: Path, home: Path) -> None:
    assert (
        work(tmp_path, home, "--fault", "payload.after_write", stage="source").returncode == -signal.SIGKILL
    )
    assert work(tmp_path, home, stage="source").returncode == 0


def test_sigterm_stops_it_and_the_next_try_resumes(tmp_path: Path, home: Path) -> None:
    made = json.loads(work(tmp_path, home, stage="source").stdout.splitlines()[-1])["ref"]
    config = {"steps": 5, "pause": 0.3}
    job = {"stage": "slow", "config": config, "inputs": {"numbers": [made]}}
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(dataclasses.asdict(Job(home=str(home), folders=[str(TOY.parent)], **job))))
    command = [sys.executable, "-m", "flows.worker", str(path)]
    process = subprocess.Popen(command, env=environment(home), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "progress":
                process.terminate()
                break
        rest = process.stdout.read()
        assert process.wait(timeout=20) == 130
        assert json.loads(rest.splitlines()[-1])["event"] == "interrupted"
    finally:
        process.kill()
        process.communicate()
    done = work(tmp_path, home, **{**job, "config": {**config, "pause": 0.0}})
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "resumed"


def test_the_job_of_a_runner_is_gone_once_it_is_read(tmp_path: Path, home: Path) -> None:
    assert work(tmp_path, home, stage="source", parent=os.getpid()).returncode == 0
    assert not (tmp_path / "job.json").exists()
    assert work(tmp_path, home, stage="source").returncode == 0
    assert (tmp_path / "job.json").exists(), "a worker started by hand may be started again"


def test_a_worker_whose_parent_is_another_process_does_not_start(tmp_path: Path, home: Path) -> None:
    done = work(tmp_path, home, stage="source", parent=os.getppid())
    assert done.returncode == 130
    assert done.stdout == ""


def test_a_message_of_any_length_and_kind_gets_through(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "stages"
    folder.mkdir()
    talk = 'context.log("a" * 40_000_000 + "z"); context.log("\\udcff.txt")'
    (folder / "show.py").write_text(SHOW_THREADS.replace("import os, sys\n", f"import os, sys; {talk}\n"))
    (folder / "one.yaml").write_text("stages: [.]\nnodes: {show: {}}\n")
    said: list[str] = []
    pipeline = Pipeline(
        Store(home),
        load(str(folder / "one.yaml")),
        listen=lambda node, event: said.append(str(event.get("message"))),
    )
    assert asyncio.run(pipeline.execute()).ok
    (long,) = [one for one in said if one.startswith("aaa")]
    assert len(long) < 70_000
    assert "a ... (39,936,001 characters cut) ... a" in long
    assert long.endswith("az")
    assert "\\udcff.txt" in said
