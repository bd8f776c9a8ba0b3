"""Promoted names and runs: the only mutable documents of a store, each replaced whole, with its history
inside.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.artifact import Artifact
from infra.errors import StoreError, disk_full_told, nearest
from infra.files import render_json
from infra.storage import Storage

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME = re.compile(rf"{_PART}(/{_PART})*")
_SINGLE = re.compile(_PART)
# Run files live under names/runs/, so no promoted name may start there.
_RUNS = "runs"
# What the two kinds of documents hold, as far as others rely on it.
_PROMOTED = {"artifact": str, "history": list}
_RUN = {"nodes": dict, "info": dict, "updated": str}


def utc_now() -> str:
    """The time now, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def check_name(name: str, what: str = "name", single: bool = False) -> str:
    """Return `name` if it can name something; StoreError saying what is allowed otherwise."""
    if not (_SINGLE if single else _NAME).fullmatch(name) or (not single and name.split("/")[0] == _RUNS):
        slash = "" if single else ", with / between parts (not starting with runs/)"
        raise StoreError(f"{what} {name!r}: use letters, digits, '.', '_' and '-'{slash}")
    return name


class Names:
    """The documents under `names/` of one store."""

    def __init__(self, storage: Storage, home: Path) -> None:
        self._storage = storage
        self._home = home

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with disk_full_told(self._home, "writing names/"), self._storage.lock("names"):
            yield

    def promote(self, artifact: Artifact, name: str, by: str = "") -> dict[str, Any]:
        """Point `name` at an artifact; the acts before stay in its history. Returns the document.

        by: who or what did it (a run, a preset's gate), for the history.
        """
        check_name(name)
        act = {
            "artifact": artifact.ref,
            "digest": artifact.digest,
            "record": artifact.record.record_digest,
            "at": utc_now(),
            "by": by,
        }
        with self._writing():
            before = self.get(name) or {"history": []}
            document = {"name": name, **act, "history": [*before["history"], act]}
            self._storage.replace(f"names/{name}.json", render_json(document))
        return document

    def get(self, name: str) -> dict[str, Any] | None:
        """The document of a promoted name, None if there is none."""
        if not _NAME.fullmatch(name) or name.split("/")[0] == _RUNS:
            return None
        return self._document(f"names/{name}.json")

    def all(self, unread: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """Every promoted name and its document.

        unread: where to say which files cannot be read, for callers that only look; without it StoreError.
        """
        keys = [key for key in self._storage.keys("names", ".json") if not key.startswith(f"names/{_RUNS}/")]
        documents = self._documents(keys, unread)
        return {key.removeprefix("names/").removesuffix(".json"): one for key, one in documents.items()}

    def record_node(
        self,
        run: str,
        node: str,
        *,
        stage: str,
        status: str,
        artifact: Artifact | None = None,
        **details: Any,
    ) -> dict[str, Any]:
        """Note how a node of a run stands. Returns the run's document.

        status: running, built, resumed, cached, failed, skipped. Without an artifact (it is running, or
        failed) the one recorded before stays, so that `run/node` keeps meaning the newest attempt there is.
        details: plain values such as seconds or the error's text, replaced each time.
        """
        check_name(run, "run", single=True)
        check_name(node, "node", single=True)
        now = utc_now()
        with self._writing():
            document = self.run(run) or self._new_run(run, now)
            entry = document["nodes"].get(node, {"artifact": "", "digest": "", "history": []})
            history = entry["history"]
            if artifact is not None:
                entry |= {"artifact": artifact.ref, "digest": artifact.digest}
                if not history or history[-1]["artifact"] != artifact.ref:
                    history = [*history, {"artifact": artifact.ref, "digest": artifact.digest, "at": now}]
            document["nodes"][node] = {
                "artifact": entry["artifact"],
                "digest": entry["digest"],
                "stage": stage,
                "status": status,
                "at": now,
                "details": details,
                "history": history,
            }
            document["updated"] = now
            self._storage.replace(f"names/{_RUNS}/{run}.json", render_json(document))
        return document

    def describe_run(self, run: str, **info: Any) -> dict[str, Any]:
        """Note something about a whole run (preset, overrides) in plain values. Returns its document."""
        check_name(run, "run", single=True)
        now = utc_now()
        with self._writing():
            document = self.run(run) or self._new_run(run, now)
            document["info"] = {**document["info"], **info}
            document["updated"] = now
            self._storage.replace(f"names/{_RUNS}/{run}.json", render_json(document))
        return document

    def run(self, run: str) -> dict[str, Any] | None:
        """The document of a run: {run, created, updated, info, nodes: {node: {artifact, stage, status,
        ...}}}.
        """
        return self._document(f"names/{_RUNS}/{run}.json") if _SINGLE.fullmatch(run) else None

    def runs(self, unread: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """Every run and its document, the one that was updated last first. `unread` is that of `all`."""
        documents = self._documents(self._storage.keys(f"names/{_RUNS}", ".json"), unread)
        found = [(key.rpartition("/")[2].removesuffix(".json"), one) for key, one in documents.items()]
        found = [(name, one) for name, one in found if _SINGLE.fullmatch(name)]
        return dict(sorted(found, key=lambda item: item[1]["updated"], reverse=True))

    def require_run(self, run: str) -> dict[str, Any]:
        """The document of a run; StoreError naming the nearest runs when there is none."""
        document = self.run(run)
        if document is None:
            raise StoreError(f"no run is called {run!r}; {nearest(run, self.runs())}")
        return document

    @staticmethod
    def _new_run(run: str, now: str) -> dict[str, Any]:
        return {"run": run, "created": now, "updated": now, "info": {}, "nodes": {}}

    def _documents(self, keys: Iterable[str], unread: list[str] | None) -> dict[str, dict[str, Any]]:
        found = {}
        for key in keys:
            try:
                document = self._document(key)
            except StoreError as error:
                if unread is None:
                    raise
                unread.append(str(error))
                continue
            if document is not None:
                found[key] = document
        return found

    def _document(self, key: str) -> dict[str, Any] | None:
        raw = self._storage.read(key)
        if raw is None:
            return None
        try:
            document = json.loads(raw)
        except ValueError as error:
            raise StoreError(f"{key}: not readable as JSON ({error}); restore or delete the file") from None
        for name, kind in (_RUN if key.startswith(f"names/{_RUNS}/") else _PROMOTED).items():
            if not isinstance(document, dict) or not isinstance(document.get(name), kind):
                raise StoreError(f"{key}: it has no {name!r}, so it was changed; restore or delete the file")
        return document
