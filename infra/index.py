"""`index.sqlite`: a cache over the records, for listing and for finding what was built from what.

It is never the truth: every read first compares it with the folders there are, and it can be deleted at any
time.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.artifact import Artifact
from infra.errors import StoreError
from infra.record import Record

if TYPE_CHECKING:
    from infra.store import Store

# Raised when the tables change: an index of another layout is made anew.
_LAYOUT = 1
_TABLES = """
create table artifacts (
    ref text primary key, stage text not null, id text not null, fingerprint text not null,
    digest text not null, attempt integer not null, finished text not null, bytes integer not null,
    metrics text not null, record_digest text not null
);
create table inputs (reader text not null, role text not null, ref text not null);
create index inputs_by_ref on inputs (ref);
"""


@dataclass(frozen=True)
class Row:
    """One artifact as listed. finished: UTC, ISO 8601; bytes: all of its files."""

    ref: str
    stage: str
    id: str
    fingerprint: str
    digest: str
    attempt: int
    finished: str
    bytes: int
    metrics: dict[str, Any]
    record_digest: str


def _row(record: Record) -> tuple[Any, ...]:
    metrics = json.dumps(dict(record.metrics), sort_keys=True)
    return (
        record.ref,
        record.stage,
        record.id,
        record.fingerprint,
        record.digest,
        record.attempt,
        record.finished,
        record.size,
        metrics,
        record.record_digest,
    )


@contextlib.contextmanager
def _open(store: Store) -> Iterator[sqlite3.Connection]:
    """The index, in step with the folders; in memory where its file cannot be used (a read-only
    store, or one that is not there).
    """
    path = store.home / "index.sqlite"
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=10)
        _refresh(store, connection)
    except (sqlite3.Error, OSError):
        if connection is not None:
            connection.close()
        connection = sqlite3.connect(":memory:")
        _refresh(store, connection)
    try:
        yield connection
    finally:
        connection.close()


def _refresh(store: Store, connection: sqlite3.Connection) -> None:
    """Add what is missing, drop what is gone."""
    if connection.execute("pragma user_version").fetchone()[0] != _LAYOUT:
        with connection:
            for table in ("artifacts", "inputs"):
                connection.execute(f"drop table if exists {table}")
            connection.executescript(_TABLES)
            connection.execute(f"pragma user_version = {_LAYOUT}")
    known = {ref for (ref,) in connection.execute("select ref from artifacts")}
    present = set(store.refs())
    if known == present:
        return
    with connection:
        for ref in known - present:
            _drop(connection, ref)
        for ref in sorted(present - known):
            stage, _, id = ref.partition("@")
            with contextlib.suppress(StoreError):
                _add(connection, store.artifact(stage, id).record)


def _drop(connection: sqlite3.Connection, ref: str) -> None:
    connection.execute("delete from artifacts where ref = ?", (ref,))
    connection.execute("delete from inputs where reader = ?", (ref,))


def _add(connection: sqlite3.Connection, record: Record) -> None:
    _drop(connection, record.ref)
    connection.execute("insert into artifacts values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _row(record))
    connection.executemany(
        "insert into inputs values (?, ?, ?)", [(record.ref, one.role, one.ref) for one in record.inputs]
    )


def note_published(store: Store, artifact: Artifact) -> None:
    """Add a new artifact to an index that exists; what goes wrong is mended by the next read."""
    path = store.home / "index.sqlite"
    if path.exists():
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(path, timeout=10)) as connection,
        ):
            with connection:
                _add(connection, artifact.record)


def reindex(store: Store) -> tuple[int, dict[str, str]]:
    """Make the index anew from the records: `(artifacts indexed, {reference: why its record cannot be
    read})`.
    """
    (store.home / "index.sqlite").unlink(missing_ok=True)
    with _open(store) as connection:
        count = connection.execute("select count(*) from artifacts").fetchone()[0]
    return count, store.broken()


def rows(store: Store, stage: str = "", limit: int = 0) -> list[Row]:
    """Artifacts of one stage or of all, newest first; at most `limit` unless 0."""
    query = "select * from artifacts"
    values: list[Any] = []
    if stage:
        query += " where stage = ?"
        values.append(stage)
    query += " order by finished desc, ref"
    if limit:
        query += " limit ?"
        values.append(limit)
    with _open(store) as connection:
        found = connection.execute(query, values).fetchall()
    return [Row(*one[:8], metrics=json.loads(one[8]), record_digest=one[9]) for one in found]


def readers(store: Store) -> dict[str, list[tuple[str, str]]]:
    """What was built from what: reference -> `(role, reader's reference)` of everything that read it."""
    found: dict[str, list[tuple[str, str]]] = {}
    with _open(store) as connection:
        for ref, role, reader in connection.execute(
            "select ref, role, reader from inputs order by reader, rowid"
        ):
            found.setdefault(ref, []).append((role, reader))
    return found
