"""Where Prefect keeps its records for this home, and its settings, set before it is ever imported.

Prefect reads its settings once, at import. So a process that will use it calls `enter` first; a subprocess
gets the same through its environment. Nothing here imports Prefect.
"""

from __future__ import annotations

import os
from pathlib import Path

# Nothing phones home, the pages show no offers, and a run whose process vanished is noticed within minutes
# (at the default heartbeat of 180 s a healthy run can be taken for a dead one).
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def folder(home: Path) -> Path:
    """Prefect's home, made if missing: its database, logs and profile."""
    path = (home / "prefect").resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def environment(home: Path, api_url: str = "") -> dict[str, str]:
    """The environment variables for a process that talks to the server at `api_url`, or is that server."""
    settings = {"PREFECT_HOME": str(folder(home)), "HEADWATER_HOME": str(home.resolve()), **_QUIET}
    return settings | ({"PREFECT_API_URL": api_url} if api_url else {})


def enter(home: Path, api_url: str) -> None:
    """Give this process those settings. Call it before the first import of Prefect."""
    os.environ.update(environment(home, api_url))
