"""`record.json`: the truth about how an artifact came to be.

The record lists every file with its hash, and holds the digest of its own content, so that neither can
change unnoticed. The artifact's *digest* covers the deterministic payload alone: logs, plots and HTML
reports differ from run to run and are listed apart, so that what is downstream stays valid when an artifact
is built again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from infra.config import canonical_json
from infra.errors import ConfigError, CorruptArtifact, StoreError
from infra.files import render_json, sha256_bytes, sha256_file

RECORD = "record.json"
SCHEMA_VERSION = 1

# MIGRATIONS[n] turns the JSON of schema n into that of schema n + 1. Schema 1 is the first.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path relative to its folder with forward slashes, size in bytes, SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class InputRef:
    """An artifact that was read: in which role, its payload digest, and the digest of the record that was
    read.
    """

    role: str
    stage: str
    id: str
    digest: str
    record: str

    @property
    def ref(self) -> str:
        return f"{self.stage}@{self.id}"


@dataclass(frozen=True)
class Record:
    """Everything known about one artifact. Times are UTC, ISO 8601; durations in seconds."""

    stage: str
    version: int
    id: str
    attempt: int
    fingerprint: str
    digest: str
    inputs: tuple[InputRef, ...]
    # {digest, files, bytes} over the external files that an ingest stage scanned, {} for other stages.
    sources: Mapping[str, Any]
    # {identity: ..., placement: ...}
    config: Mapping[str, Any]
    seed: int
    # {commit, dirty, modules: {path: sha256}}
    code: Mapping[str, Any]
    # {python, packages, lock, hardware, numerics}
    environment: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    side_files: tuple[FileEntry, ...]
    metrics: Mapping[str, Any]
    timings: Mapping[str, float]
    started: str
    finished: str
    # One entry a try of this build, the last one the try that published: {started, code, numerics}.
    tries: tuple[Mapping[str, Any], ...]
    # The Prefect run's id and URL, {} without one.
    prefect: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION
    # SHA-256 over everything above; filled in when the record is rendered and when it is read.
    record_digest: str = ""

    @property
    def ref(self) -> str:
        """The reference `stage@id`."""
        return f"{self.stage}@{self.id}"

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.bytes for entry in (*self.files, *self.side_files))

    def render(self) -> bytes:
        """The bytes of record.json, self-digest included."""
        data = dataclasses.asdict(self)
        data["record_digest"] = self_digest(data)
        return render_json(data)


def is_side_file(path: str) -> bool:
    """Whether a payload file is outside the digest: under logs/ or plots/, or an HTML page at the top."""
    parts = PurePosixPath(path).parts
    return (len(parts) > 1 and parts[0] in ("logs", "plots")) or (len(parts) == 1 and path.endswith(".html"))


def payload_digest(files: tuple[FileEntry, ...]) -> str:
    """The digest over the deterministic payload: SHA-256 of the sorted list of (path, bytes, sha256)."""
    return sha256_bytes(canonical_json(sorted([entry.path, entry.bytes, entry.sha256] for entry in files)))


def list_files(folder: Path) -> list[str]:
    """Relative paths of the files in a payload, sorted, record.json left out.

    Raises StoreError for a link or special file: a payload must mean the same on another disk.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(
                f"{path}: a payload may hold plain files and folders only; copy the file instead"
            )
        if path.is_file() and name != RECORD:
            found.append(name)
    return found


def hash_files(folder: Path) -> tuple[tuple[FileEntry, ...], tuple[FileEntry, ...]]:
    """Hash a payload: `(deterministic files, side files)`, each sorted by path."""
    files: list[FileEntry] = []
    side: list[FileEntry] = []
    for name in list_files(folder):
        path = folder / name
        entry = FileEntry(name, path.stat().st_size, sha256_file(path))
        (side if is_side_file(name) else files).append(entry)
    return tuple(files), tuple(side)


def self_digest(data: Mapping[str, Any]) -> str:
    """The digest of a record's JSON without its `record_digest` field."""
    return sha256_bytes(canonical_json(_listed({k: v for k, v in data.items() if k != "record_digest"})))


def _listed(value: Any) -> Any:
    """Tuples to lists and mappings to dicts, as JSON will have them."""
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(inner) for inner in value]
    return value


def migrate(
    data: dict[str, Any],
    migrations: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = MIGRATIONS,
    current: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """Bring a record's JSON to the `current` schema, one step at a time.

    Raises StoreError for a schema that is newer than this code or that no migration leads from.
    """
    schema = data.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise StoreError(f"schema {schema!r} is not a version number")
    if schema > current:
        raise StoreError(f"schema {schema} is newer than this Headwater knows ({current}); update Headwater")
    while schema < current:
        if schema not in migrations:
            raise StoreError(f"no migration leads from schema {schema} to {schema + 1}")
        data = {**migrations[schema](dict(data)), "schema": schema + 1}
        schema += 1
    return data


def read_record(folder: Path) -> Record:
    """Read and check `folder/record.json`.

    Raises StoreError when there is none, CorruptArtifact when its bytes are not what was published or a
    field is missing; both name the file.
    """
    path = folder / RECORD
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{folder}: not an artifact (it has no {RECORD})") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from None
    return from_bytes(raw, str(path))


def _as_published(data: Any, raw: bytes) -> bool:
    """Whether the JSON in `raw` agrees with its own digest, to the byte."""
    try:
        # The rendering is compared too: a byte flipped between two kinds of white space leaves the content as
        # it was.
        return (
            isinstance(data, dict)
            and data.get("record_digest") == self_digest(data)
            and render_json(data) == raw
        )
    except ConfigError:  # 1e905 and half a surrogate pair can be read, but not written
        return False


def from_bytes(raw: bytes, where: str = RECORD) -> Record:
    """The record in the bytes of a record.json, self-digest checked and schema migrated."""
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise CorruptArtifact(
            f"{where}: not readable as JSON ({error}); rebuild the artifact with --force"
        ) from None
    if not _as_published(data, raw):
        raise CorruptArtifact(
            f"{where}: it was changed after publishing (its own digest does not match); "
            "rebuild the artifact with --force"
        )
    try:
        data = migrate(data)
    except StoreError as error:
        raise StoreError(f"{where}: {error}") from None
    names = {one.name for one in dataclasses.fields(Record)}
    if set(data) != names:
        odd = ", ".join(sorted(set(data) ^ names))
        raise CorruptArtifact(f"{where}: missing or unknown fields: {odd}")
    data["inputs"] = tuple(InputRef(**one) for one in data["inputs"])
    data["files"] = tuple(FileEntry(**one) for one in data["files"])
    data["side_files"] = tuple(FileEntry(**one) for one in data["side_files"])
    data["tries"] = tuple(data["tries"])
    return Record(**data)
