"""A Prefect server on loopback for one home: started, found again, and ended.

`headwater up` runs one with every service until Ctrl-C and leaves its address for others; `headwater run`
records there when it is up, and otherwise starts a bare one for the length of the run, on the same
database, so that the run can be looked at later. Nothing here imports Prefect: the server is a program of
its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows import leash, prefect_home
from infra.errors import HeadwaterError
from infra.files import atomic_write_json

HOST = "127.0.0.1"
FIRST_PORT = 4200
# A first start creates the database: 8 s on an idle core, several times that on a busy one.
PATIENCE = 180.0


@dataclass(frozen=True)
class Server:
    """A server that answers: where its API is, its pages, and its process."""

    api_url: str
    ui_url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def serve(home: Path, port: int = 0, services: bool = True) -> Iterator[Server]:
    """A server for the length of the `with`; `port` 0 takes any free one.

    Without `services` it only records: no scheduler, no pages. HeadwaterError when the port is taken, or
    when the server does not come up, with the end of its log.
    """
    port = port or free_port()
    if not is_free(port):
        raise HeadwaterError(f"port {port} on {HOST} is taken by another program; name another with --port")
    log = prefect_home.folder(home) / ("server.log" if services else "run-server.log")
    command = [sys.executable, "-P", "-m", "flows.prefect_server", "start"]
    command += ["--host", HOST, "--port", str(port)] + ([] if services else ["--no-services", "--no-ui"])
    url = f"http://{HOST}:{port}"
    environment = {
        **prefect_home.environment(home, f"{url}/api", lasting=services),
        # By default any web site that a browser shows could talk to the server.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},http://localhost:{port}",
    }
    process = leash.start(command, environment, log)
    try:
        _wait(process, port, log)
        yield Server(f"{url}/api", url, process, log)
    finally:
        leash.stop(process, grace=10.0)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until this very server answers. Another home's may have come to the port first, and answers too;
    deployments made there would replace its own.
    """
    until = time.monotonic() + PATIENCE
    while not (healthy(f"http://{HOST}:{port}/api") and listens(process.pid, port)):
        if process.poll() is not None:
            raise HeadwaterError(f"the Prefect server ended at its start; {log} says:\n{leash.tail(log)}")
        if time.monotonic() > until:
            raise HeadwaterError(f"the Prefect server did not answer within {PATIENCE:.0f} s; see {log}")
        time.sleep(0.1)


def healthy(api_url: str, timeout: float = 2.0) -> bool:
    """Whether a Prefect server answers at `api_url` within `timeout` seconds."""
    try:
        # Loopback only, whatever proxy the machine is set to use.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{api_url}/health", timeout=timeout) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


def listens(pid: int, port: int) -> bool:
    """Whether a process or one that it has started listens on `port`."""
    import psutil

    try:
        leader = psutil.Process(pid)
        for one in (leader, *leader.children(recursive=True)):
            for connection in one.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True  # it cannot be known here
    return False


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of loopback now."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # A port that a server has just left still counts as free, as it will for the next one.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port(first: int = 0) -> int:
    """A free port on loopback: the next one from `first` on, or any."""
    if not first:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.bind((HOST, 0))
            return int(probe.getsockname()[1])
    for port in range(first, first + 100):
        if is_free(port):
            return port
    raise HeadwaterError(f"no free port on {HOST} from {first} to {first + 99}; name one with --port")


@contextlib.contextmanager
def announce(home: Path, server_port: int) -> Iterator[None]:
    """Hold the place of *the* server of this home, and say where it is. HeadwaterError when it is taken.

    The lock and not the file says whether one is running: a file outlives a killed process.
    """
    folder = prefect_home.folder(home)
    with (folder / "up.lock").open("a") as lock:
        if not _locked(lock.fileno()):
            raise HeadwaterError(f"`headwater up` is running already for {home}: {running(home)}")
        atomic_write_json(
            folder / "up.json",
            {"api_url": f"http://{HOST}:{server_port}/api", "pid": os.getpid()},
            points=None,
        )
        try:
            yield
        finally:
            (folder / "up.json").unlink(missing_ok=True)


def _locked(handle: int) -> bool:
    """Take the lock; somebody who only looks holds it for an instant, so try for a moment."""
    for _ in range(10):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def running(home: Path) -> str:
    """The API of the server that `headwater up` runs for this home, "" when there is none that answers."""
    folder = home / "prefect"
    try:
        with (folder / "up.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return ""  # nobody holds it
    except BlockingIOError:
        pass
    except OSError:
        return ""
    try:
        url = str(json.loads((folder / "up.json").read_text())["api_url"])
    except (OSError, ValueError, KeyError):
        return ""
    return url if healthy(url) else ""
