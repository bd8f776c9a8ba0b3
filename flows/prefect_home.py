"""Where Prefect keeps its records for this home, and its settings, set before it is ever imported.

Prefect reads its settings once, at import. So a process that will use it calls `enter` first; a subprocess
gets the same through its environment. Nothing here imports Prefect.
"""

from __future__ import annotations

import os
from pathlib import Path

# Nothing phones home, and the pages show no offers.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def folder(home: Path) -> Path:
    """Prefect's home, made if missing: its database, logs and profile."""
    path = (home / "prefect").resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


# A run whose process vanished is noticed by its missing heartbeats (see flows.deploy). At Prefect's default
# of 180 s between them a healthy run can be taken for a dead one.
_LASTING = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}


def environment(home: Path, api_url: str, lasting: bool) -> dict[str, str]:
    """The variables for a process that talks to the server at `api_url`, or is that server.

    lasting: the server goes on after a run, so its addresses mean something later.
    """
    settings = {
        "PREFECT_HOME": str(folder(home)),
        "HEADWATER_HOME": str(home.resolve()),
        "PREFECT_API_URL": api_url,
        **_QUIET,
    }
    return settings | ({**_LASTING, "PREFECT_UI_URL": api_url.removesuffix("/api")} if lasting else {})


def enter(home: Path, api_url: str, lasting: bool, console: bool = True) -> None:
    """Give this process those settings; call it before the first import of Prefect.

    Without `console` it is a command that prints its own lines: Prefect's log goes to the server alone.
    """
    os.environ.update(environment(home, api_url, lasting))
    if not console:
        # A server that is gone is found to be gone in seconds; the command does not depend on it.
        os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "1"
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
