"""Prefect for real: `headwater up` serves, schedules and runs; what a command makes is seen in it.

One server for the whole file: its start is most of the time. Everything goes through the HTTP API, as a
browser would, so Prefect itself is not imported here.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import server
from flows.preset import load, shipped
from flows.registry import stages
from infra.store import Store
from tests.flows.conftest import TOY, environment

pytestmark = pytest.mark.timeout(180)
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Up:
    """A running `headwater up`."""

    home: Path
    process: subprocess.Popen[bytes]
    url: str

    def call(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """One request to the server's API."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with _LOOPBACK.open(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def deployment(self, name: str) -> Any:
        flow, _, deployment = name.partition("/")
        return self.call(f"/deployments/name/{flow}/{deployment}")

    def start(self, name: str, parameters: dict[str, Any]) -> str:
        """Start a run of a deployment, as the form does."""
        identity = self.deployment(name)["id"]
        return self.call(f"/deployments/{identity}/create_flow_run", {"parameters": parameters})["id"]

    def state(self, run: str) -> str:
        return self.call(f"/flow_runs/{run}")["state"]["type"]

    def wait(self, run: str, states: set[str], within: float = 120.0) -> str:
        until = time.monotonic() + within
        while time.monotonic() < until:
            state = self.state(run)
            if state in states:
                return state
            time.sleep(0.3)
        worker = (self.home / "prefect" / "worker.log").read_text()[-3000:]
        pytest.fail(f"run {run} is {state} after {within} s\n{worker}")


ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = tmp_path_factory.mktemp("up") / "home"
    command = [sys.executable, "-P", "-m", "flows.cli", "up", "--port", str(server.free_port())]
    for preset in (*shipped(), str(TOY)):
        command += ["--preset", preset]
    log = home.parent / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(home),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # As in the background of a script: Ctrl-C is ignored there, and must end it all the same.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
    try:
        until = time.monotonic() + 150
        while "deployments, one worker" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        url = server.running(home)
        assert url
        yield Up(home, process, url)
        started = family(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive, "something outlived `headwater up`"
        assert server.running(home) == ""
        assert log.read_text().endswith("ended\n")
    finally:
        if process.poll() is None:
            for one in family(process.pid):
                one.kill()
        process.wait()


def test_the_server_listens_on_loopback_alone(up: Up) -> None:
    port = int(up.url.rpartition(":")[2].partition("/")[0])
    listening = {
        connection.laddr.ip
        for one in family(up.process.pid)
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


def test_no_other_web_site_may_talk_to_it(up: Up) -> None:
    for origin, allowed in ((up.url.removesuffix("/api"), True), ("https://example.org", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        request = urllib.request.Request(f"{up.url}/flow_runs/filter", headers=asked, method="OPTIONS")
        try:
            with _LOOPBACK.open(request, timeout=30) as answer:
                given = answer.headers.get("Access-Control-Allow-Origin")
        except urllib.error.HTTPError as error:
            with error:
                given = error.headers.get("Access-Control-Allow-Origin")
        assert (given == origin) is allowed


def test_every_stage_every_node_and_every_preset_is_deployed(up: Up) -> None:
    found = {one["id"]: one for one in up.call("/deployments/filter", {})}
    names = {one["name"] for one in found.values()}
    assert len([one for one in found.values() if one["name"] == "stage"]) == len(stages())
    presets = [load(name) for name in shipped()]
    assert {f"{preset.name}-{node}" for preset in presets for node in preset.nodes} <= names
    assert {*shipped(), "toy", "nightly"} <= names
    assert all(one["pull_steps"] for one in found.values())


def test_the_form_of_a_stage_is_typed_and_has_no_unions(up: Up) -> None:
    for stage in stages().values():
        schema = up.deployment(f"{stage.name}/stage")["parameter_openapi_schema"]
        assert {"config", "run", "node", "force", "refresh", *stage.inputs} == set(schema["properties"])
        assert '"anyOf"' not in json.dumps(schema), f"the form of {stage.name} breaks on a union"
        reference = schema["properties"]["config"]["$ref"]
        fields = schema["definitions"][reference.rpartition("/")[2]]["properties"]
        assert set(fields) == set(stage.config.model_fields)


def test_a_nodes_form_is_filled_in(up: Up) -> None:
    preset = load(shipped()[0])
    node = next(iter(preset.nodes.values()))
    given = up.deployment(f"{node.stage.name}/{preset.name}-{node.name}")["parameters"]
    assert given["run"] == preset.name
    assert given["node"] == node.name
    assert stages()[node.stage.name].config(**given["config"]) == node.config


def test_the_cron_deployment_gets_scheduled_runs(up: Up) -> None:
    refresh = up.deployment("refresh/nightly")
    assert refresh["parameters"] == {"runs": [*shipped(), "toy"]}
    assert [one["schedule"]["cron"] for one in refresh["schedules"]] == ["0 3 * * *"]
    query = {
        "deployments": {"id": {"any_": [refresh["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    until = time.monotonic() + 90
    while not (runs := up.call("/flow_runs/filter", query)):
        assert time.monotonic() < until, "the scheduler has made no runs"
        time.sleep(0.5)
    assert all(run["auto_scheduled"] for run in runs)


def test_a_refresh_runs_again_what_there_is_as_it_was_and_begins_nothing(up: Up) -> None:
    command = [sys.executable, "-P", "-m", "flows.cli", "run", "--preset", str(TOY), "--no-prefect"]
    command += ["--set", "left.count=7", "--to", "left"]
    done = subprocess.run(command, env=environment(up.home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    store = Store(up.home)
    before, refs = store.names.run("toy"), store.refs()
    assert up.wait(up.start("refresh/nightly", {}), ENDED) == "COMPLETED"
    after = store.names.run("toy")
    assert store.refs() == refs
    assert after["info"]["sets"] == ["left.count=7"]
    assert after["nodes"]["left"]["artifact"] == before["nodes"]["left"]["artifact"]
    assert after["updated"] > before["updated"]
    assert list(after["nodes"]) == ["left"]
    assert not set(shipped()) & set(store.names.runs())


def test_two_pipelines_of_one_preset_queue(up: Up) -> None:
    deployment = up.deployment("pipeline/toy")
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"


def test_a_stage_runs_through_the_worker_and_its_artifact_is_in_the_store(up: Up) -> None:
    config = {"seed": 3, "families": {"addition": {"train": 20, "held_out": 5, "size": 3}}}
    run = up.start("tasks/stage", {"config": config, "run": "form"})
    assert up.wait(run, ENDED) == "COMPLETED"
    made = Store(up.home).resolve("form/tasks")
    assert made.metrics["train"] == 20
    assert made.record.seed == 3
    assert made.record.prefect["flow_run_id"] == run
    assert made.record.prefect["url"].endswith(f"/runs/flow-run/{run}")
    artifacts = {one["key"]: one for one in up.call("/artifacts/filter", {})}
    assert "```mermaid" in artifacts["form-tasks-lineage"]["data"]
    rows = {row["figure"]: row["value"] for row in json.loads(artifacts["form-tasks-summary"]["data"])}
    assert rows["artifact"] == made.ref
    assert rows["train"] == "20"
    # The log is sent in batches, the last of them when the process ends.
    until, logs = time.monotonic() + 30, ""
    while "building tasks: first tasks in this store" not in logs:
        assert time.monotonic() < until, logs
        query = {"logs": {"flow_run_id": {"any_": [run]}}}
        logs = "\n".join(one["message"] for one in up.call("/logs/filter", query))
        time.sleep(0.3)


def test_a_wrong_value_is_refused_by_the_form(up: Up) -> None:
    identity = up.deployment("tasks/stage")["id"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        up.call(f"/deployments/{identity}/create_flow_run", {"parameters": {"config": {"held_out_share": 5}}})
    assert caught.value.code in (409, 422)
    caught.value.close()


def test_writers_side_by_side_are_not_refused(up: Up) -> None:
    """With Prefect's own transactions some of these are answered with 503: see flows.prefect_server."""
    identity = up.call("/flows/", {"name": "crowd"})["id"]

    def write(_: int) -> str:
        return up.call("/flow_runs/", {"flow_id": identity, "state": {"type": "PENDING"}})["id"]

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(write, range(120)))) == 120


def test_a_queue_is_paused_at_once(up: Up) -> None:
    """The server opens a second session inside the transaction here, which must not wait for the first."""
    queues = "/work_pools/headwater/queues"
    up.call(queues, {"name": "paused"})
    began = time.monotonic()
    up.call(f"{queues}/paused", {"is_paused": True}, "PATCH")
    assert time.monotonic() - began < 20
    assert up.call(f"{queues}/paused")["is_paused"]


def test_a_run_of_the_command_is_recorded_where_up_runs(up: Up) -> None:
    command = [sys.executable, "-P", "-m", "flows.cli", "run", "--preset", str(TOY), "--run", "typed"]
    done = subprocess.run(command, env=environment(up.home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"recording in Prefect at {up.url}" in done.stderr
    assert "| INFO" not in done.stderr, "Prefect's own log stays out of the terminal"
    (parent,) = up.call("/flow_runs/filter", {"flow_runs": {"name": {"any_": ["typed"]}}})
    assert parent["state"]["type"] == "COMPLETED"
    query = {"flow_runs": {"parent_flow_run_id": {"any_": [parent["id"]]}}}
    children = {one["name"]: one["state"]["type"] for one in up.call("/flow_runs/filter", query)}
    assert children == dict.fromkeys(("left", "right", "train", "control", "last"), "COMPLETED")
    keys = {one["key"] for one in up.call("/artifacts/filter", {})}
    assert {"typed-stages", "typed-gates", "typed-lineage", "typed-train-summary"} <= keys
    # One node again, recorded there too.
    command = [
        sys.executable,
        "-P",
        "-m",
        "flows.cli",
        "stage",
        "train",
        "--run",
        "typed",
        "--set",
        "train.steps=5",
    ]
    done = subprocess.run(command, env=environment(up.home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Store(up.home).resolve("typed/train").record.prefect["flow_run_name"] == "train"


def test_cancelling_a_run_ends_its_whole_process_tree_and_it_resumes(up: Up) -> None:
    settings = ["train.pause=1.0", "train.steps=30"]
    run = up.start("pipeline/toy", {"preset": str(TOY), "settings": settings, "run": "cancelled"})
    store = Store(up.home)
    until = time.monotonic() + 90
    state: list[Path] = []
    while not state:
        assert time.monotonic() < until, up.state(run)
        state = list((store.home / "work").glob("*/scratch/state.json"))
        time.sleep(0.2)
    workers = [one for one in family(up.process.pid) if "flows.worker" in " ".join(one.cmdline())]
    assert workers
    up.call(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    _, alive = psutil.wait_procs(workers, timeout=40)
    assert not alive
    assert up.wait(run, ENDED) == "CANCELLED"
    assert state[0].exists(), "what it had done is kept"
    assert not list((store.home / "artifacts").glob("*/" + state[0].parent.parent.name))


def test_a_second_up_for_the_same_home_is_refused(up: Up) -> None:
    command = [sys.executable, "-P", "-m", "flows.cli", "up"]
    done = subprocess.run(command, env=environment(up.home), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"running already for {up.home}: {up.url}" in done.stderr


def test_a_server_that_does_not_answer_keeps_no_run_from_its_work(tmp_path: Path) -> None:
    home = tmp_path / "home"
    address = f"http://127.0.0.1:{server.free_port()}/api"
    command = [sys.executable, "-P", "-m", "flows.cli", "run", "--preset", str(TOY)]
    variables = {**environment(home), "PREFECT_API_URL": address}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"recording in Prefect at {address}" in done.stderr
    assert "going on without it" in done.stderr
    assert "train    built" in done.stdout


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_keeps_no_run_from_its_work(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-P", "-m", "flows.cli", "run", "--preset", str(TOY), "--set", "train.pause=1"]
    process = subprocess.Popen(
        command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "train" in line and "25%" in line:
                break
        started = psutil.Process(process.pid).children()
        servers = [one for one in started if "flows.prefect_server" in one.cmdline()]
        assert servers
        for one in servers:
            one.kill()
        out, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors
        assert "last     built" in out
    finally:
        process.kill()
        process.communicate()


def test_without_a_server_a_run_brings_its_own_and_leaves_its_records(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-P", "-m", "flows.cli", "run", "--preset", str(TOY), "--to", "left"]
    process = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=150)
    assert process.returncode == 0, process.stderr
    assert "starting a Prefect server for this run" in process.stderr
    with contextlib.closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        runs = dict(database.execute("select name, state_type from flow_run").fetchall())
        (logged,) = database.execute("select count(*) from log where message like '%left done%'").fetchone()
    assert runs == {"pipeline": "COMPLETED", "left": "COMPLETED"}
    assert logged == 1
    assert "url" not in Store(home).resolve("toy/left").record.prefect
    everyone = [one.info["environ"] or {} for one in psutil.process_iter(["environ"])]
    assert str(home / "prefect") not in [one.get("PREFECT_HOME") for one in everyone], (
        "its server is still there"
    )
    assert (home / "reports" / "toy" / "report.html").exists()
