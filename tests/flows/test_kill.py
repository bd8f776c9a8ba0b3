"""Every stage of the real pipeline killed again and again: what comes out must be what an undisturbed run
makes.

Slow, because it runs the smoke preset twice and starts it over a few dozen times.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.preset import load
from flows.runner import Options, Pipeline
from infra.faults import POINTS
from infra.store import Store
from tests.flows.conftest import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 20


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "flows.cli", *arguments]


def digests(home: Path, run: str = "smoke") -> dict[str, str]:
    """Payload digest of every node of the run."""
    store = Store(home)
    nodes = store.names.run(run)["nodes"]
    return {node: store.resolve(f"{run}/{node}").digest for node in nodes}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run that nothing happened to."""
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    subprocess.run(
        command("run", "--preset", "smoke", "--no-prefect"),
        env=environment(home),
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=600,
    )
    return home


def test_killed_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    home, kills, moments = tmp_path / "home", 0, random.Random(11)
    while True:
        process = subprocess.Popen(
            command("run", "--preset", "smoke", "--no-prefect"),
            env=environment(home),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            # Start-up takes a second or two; the first workers are at work from then on.
            assert process.wait(moments.uniform(1.5, 7.0) if kills < KILLS else 600) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            time.sleep(0.2)
    assert kills == KILLS, "the pipeline was done before all kills: shorten the moments"
    assert digests(home) == digests(undisturbed)


@pytest.mark.parametrize("node", ["pack", "pretrain", "grpo"])
def test_killed_at_every_fault_point(node: str, undisturbed: Path) -> None:
    """A point that the node's stage does not pass does not kill it; the run then simply finishes."""
    store, expected, killed = Store(undisturbed), digests(undisturbed)[node], []
    for point in POINTS:
        again = Options(start=(node,), stop=(node,), force=True, faults={node: point})
        result = asyncio.run(Pipeline(store, load("smoke"), "", again, lambda *_: None).execute())
        if not result.ok:
            killed.append(point)
            again = Options(start=(node,), stop=(node,), force=True)
            result = asyncio.run(Pipeline(store, load("smoke"), "", again, lambda *_: None).execute())
        assert result.ok
        assert result.outcomes[node].artifact is not None
        assert result.outcomes[node].artifact.digest == expected
    assert len(killed) >= 5
