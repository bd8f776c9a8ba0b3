"""Whether artifacts still are what their records say: every byte, and every record they were built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra import mend
from infra.artifact import Artifact
from infra.errors import CorruptArtifact, StoreError
from infra.files import sha256_file
from infra.fingerprint import artifact_id, fingerprint
from infra.record import RECORD, FileEntry, InputRef, Record, list_files, payload_digest

if TYPE_CHECKING:
    from infra.store import Store


@dataclass(frozen=True)
class Problem:
    """One thing wrong: `kind` is changed, missing, extra or record."""

    ref: str
    path: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.ref}: {self.path}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """What was re-hashed (references, the asked-for one first), how much, and what is wrong."""

    checked: tuple[str, ...]
    files: int
    bytes: int
    problems: tuple[Problem, ...]
    # What is wrong with an attempt beside which another holds the same bytes, and which one that is.
    healed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


def file_problems(artifact: Artifact, hash_content: bool = True) -> list[Problem]:
    """Compare an artifact's files with its record: missing, extra, other size, other bytes.

    Without `hash_content` only names and sizes are compared.
    """
    ref, folder = artifact.ref, artifact.path
    listed = {entry.path: entry for entry in (*artifact.record.files, *artifact.record.side_files)}
    try:
        present = set(list_files(folder))
    except StoreError as error:
        return [Problem(ref, str(folder), "extra", str(error))]
    problems = [_file_problem(artifact, entry, present, hash_content) for entry in listed.values()]
    problems += [
        Problem(ref, str(folder / name), "extra", "not listed in the record")
        for name in sorted(present - set(listed))
    ]
    return [problem for problem in problems if problem is not None]


def _file_problem(
    artifact: Artifact, entry: FileEntry, present: set[str], hash_content: bool
) -> Problem | None:
    path = artifact.path / entry.path
    if entry.path not in present:
        return Problem(artifact.ref, str(path), "missing", "listed in the record but missing")
    size = path.stat().st_size
    if size != entry.bytes:
        return Problem(artifact.ref, str(path), "changed", f"{size:,} bytes, the record says {entry.bytes:,}")
    if hash_content:
        try:
            found = sha256_file(path)
        except OSError as error:
            return Problem(artifact.ref, str(path), "changed", f"cannot be read ({error})")
        if found != entry.sha256:
            return Problem(
                artifact.ref,
                str(path),
                "changed",
                f"content changed (SHA-256 {found[:12]}, not {entry.sha256[:12]})",
            )
    return None


def require_intact(store: Store, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Re-hash artifacts that are about to be read. Returns them, an intact attempt with the same fingerprint
    and digest standing in for one that is damaged.

    Raises CorruptArtifact naming artifact, file and what to do when there is none.
    """
    once: dict[Path, Artifact] = {}
    problems: list[Problem] = []
    for artifact in artifacts:
        if artifact.path not in once:
            once[artifact.path] = artifact
            wrong = file_problems(artifact)
            other = stand_in(store, artifact.ref, artifact.digest) if wrong else artifact
            if other is None:
                problems += wrong
            else:
                once[artifact.path] = other
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        told = "\n".join(mend.advice(store, ref) for ref in dict.fromkeys(one.ref for one in problems))
        raise CorruptArtifact(f"not what was published:\n{listed}{more}\n{told}")
    return [once[artifact.path] for artifact in artifacts]


def require_unchanged(store: Store, artifact: Artifact) -> None:
    """Re-hash one artifact; CorruptArtifact if it is not what was published, whatever could stand in."""
    wrong = file_problems(artifact)
    if wrong:
        listed = "\n".join(f"  {problem}" for problem in wrong[:10])
        raise CorruptArtifact(f"not what was published:\n{listed}\n{mend.advice(store, artifact.ref)}")


def stand_in(store: Store, ref: str, digest: str) -> Artifact | None:
    """The newest other attempt at `ref` whose payload has that digest and is intact, None without one."""
    stage, _, id = ref.partition("@")
    for _, other in reversed(store.attempts(stage, id)):
        if other == id:
            continue
        try:
            found = store.artifact(stage, other)
        except StoreError:
            continue
        if found.digest == digest and not _own_problems(found):
            return found
    return None


def _own_problems(artifact: Artifact) -> list[Problem]:
    return file_problems(artifact) + record_problems(artifact.record, str(artifact.path))


def record_problems(record: Record, folder: str) -> list[Problem]:
    """Check that a record's digest, fingerprint and id follow from what it lists."""
    path = f"{folder}/{RECORD}"
    inputs: dict[str, list[str]] = {}
    for one in record.inputs:
        inputs.setdefault(one.role, []).append(one.digest)
    source = record.sources.get("digest", "")
    expected = fingerprint(record.stage, record.version, record.config["identity"], inputs, source)
    checks = {
        "digest": (record.digest, payload_digest(record.files)),
        "fingerprint": (record.fingerprint, expected),
        "id": (record.id, artifact_id(record.fingerprint, record.attempt)),
    }
    return [
        Problem(record.ref, path, "record", f"its {name} does not follow from its content")
        for name, (said, true) in checks.items()
        if said != true
    ]


def verify(store: Store, artifact: Artifact) -> Verification:
    """Re-hash an artifact and everything upstream of it; also check that each consumer's pins still hold.

    An input that is damaged or gone counts as healed where another attempt holds the very bytes that were
    read: what is downstream stays valid when its input is built again.
    """
    check = _Check(store)
    check.problems += check.own(artifact)
    seen = {artifact.ref}
    todo = [artifact]
    while todo:
        one = todo.pop(0)
        for pin in one.record.inputs:
            found = check.follow(one, pin)
            if found is not None and found.ref not in seen:
                seen.add(found.ref)
                todo.append(found)
    records = [one.record for one, _ in check.hashed.values()]
    return Verification(
        tuple(check.hashed),
        sum(len(record.files) + len(record.side_files) for record in records),
        sum(record.size for record in records),
        tuple(dict.fromkeys(check.problems)),
        tuple(check.healed.values()),
    )


class _Check:
    """What a verification has found so far."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.hashed: dict[str, tuple[Artifact, list[Problem]]] = {}
        self.problems: list[Problem] = []
        self.healed: dict[str, str] = {}

    def own(self, artifact: Artifact) -> list[Problem]:
        """What is wrong with an artifact by itself; each is hashed once."""
        if artifact.ref not in self.hashed:
            self.hashed[artifact.ref] = (artifact, _own_problems(artifact))
        return self.hashed[artifact.ref][1]

    def follow(self, reader: Artifact, pin: InputRef) -> Artifact | None:
        """Open a pinned input, or what stands in for it, noting what is wrong; None when there is neither."""
        found, wrong = self._open(reader, pin)
        if not wrong:
            return found
        other = stand_in(self.store, pin.ref, pin.digest)
        if other is None:
            self.problems += wrong
            return found
        self.healed.setdefault(pin.ref, f"{wrong[0]}; {other.ref} holds the same bytes")
        self.own(other)
        return other

    def _open(self, reader: Artifact, pin: InputRef) -> tuple[Artifact | None, list[Problem]]:
        path = str(self.store.folder(pin.stage, pin.id))
        try:
            found = self.store.artifact(pin.stage, pin.id)
        except CorruptArtifact as error:
            return None, [Problem(pin.ref, f"{path}/{RECORD}", "record", str(error))]
        except StoreError:
            gone = f"read by {reader.ref} but no longer in the store"
            return None, [Problem(pin.ref, path, "missing", gone)]
        wrong = list(self.own(found))
        if found.record.record_digest != pin.record or found.digest != pin.digest:
            told = f"not the record that {reader.ref} was built from"
            wrong.insert(0, Problem(pin.ref, f"{path}/{RECORD}", "record", told))
        return found, wrong
