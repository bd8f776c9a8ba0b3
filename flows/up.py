"""`headwater up`: a Prefect server, a worker and every deployment, on loopback, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flows import leash, prefect_home, server
from infra.errors import HeadwaterError

# Prefect gives the flows of a worker that ends 30 s; those give their own workers 25.
_GRACE = 40.0


def up(home: Path, port: int, presets: Sequence[str], say: Callable[[str], None]) -> None:
    """Run until Ctrl-C or SIGTERM. HeadwaterError when it runs already or a program ends by itself."""
    port = port or server.free_port(server.FIRST_PORT)
    # A shell's background job ignores Ctrl-C; this one must end by it, and by SIGTERM in the same tidy way.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server.announce(home, port):
        say("starting the Prefect server (the first time takes half a minute)")
        try:
            with server.serve(home, port) as running:
                _serve(home, running, presets, say)
        except KeyboardInterrupt:
            say("ended")


def _serve(home: Path, running: server.Server, presets: Sequence[str], say: Callable[[str], None]) -> None:
    prefect_home.enter(home, running.api_url, lasting=True)
    from flows.deploy import POOL, deploy

    made = asyncio.run(deploy(presets))
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    log = prefect_home.folder(home) / "worker.log"
    environment = prefect_home.environment(home, running.api_url, lasting=True)
    worker = leash.start([*command, "--name", "headwater"], environment, log)
    try:
        say(f"{running.ui_url}  {len(made)} deployments, one worker; Ctrl-C ends it all")
        _watch(running, worker, log)
    finally:
        say("ending")
        leash.stop(worker, grace=_GRACE)


def _watch(served: server.Server, worker: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        for name, process, said in (("server", served.process, served.log), ("worker", worker, log)):
            if process.poll() is not None:
                raise HeadwaterError(
                    f"the Prefect {name} ended by itself (code {process.returncode}); {said} says:\n"
                    f"{leash.tail(said)}"
                )
        time.sleep(0.5)
