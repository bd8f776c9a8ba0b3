"""Prefect's server as a program: its port, and what is said when it ends. No server is started here."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import server, up
from infra.errors import HeadwaterError


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server((server.HOST, 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.fixture
def idle() -> Iterator[subprocess.Popen[bytes]]:
    """A program that listens nowhere."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_port_that_is_taken_is_refused(home: Path, taken: int) -> None:
    assert not server.is_free(taken)
    assert server.free_port(taken) > taken
    with pytest.raises(HeadwaterError, match=f"port {taken} on .* is taken .*--port"):
        with server.serve(home, taken):
            raise AssertionError("it was to be refused")


def test_the_answer_of_another_server_does_not_count(
    home: Path, taken: int, idle: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not server.listens(idle.pid, taken)
    monkeypatch.setattr(server, "healthy", lambda url: True)
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    with pytest.raises(HeadwaterError, match="did not answer"):
        server._wait(idle, taken, home / "log")
    idle.kill()
    idle.wait()
    with pytest.raises(HeadwaterError, match="ended at its start"):
        server._wait(idle, taken, home / "log")


def test_a_server_that_ends_is_quoted(tmp_path: Path, idle: subprocess.Popen[bytes]) -> None:
    log = tmp_path / "server.log"
    log.write_text("the database is locked\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as ended:
        ended.wait()
        served = server.Server("", "", ended, log)
        with pytest.raises(HeadwaterError, match=r"(?s)code 3.*server\.log says:.*the database is locked"):
            up._watch(served, idle, tmp_path / "worker.log")
