"""Whether artifacts still are what their records say: every byte, and every record they were built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def require_intact(artifacts: Sequence[Artifact]) -> None:
    """Re-hash artifacts that are about to be read; CorruptArtifact naming artifact and file if anything is
    off.
    """
    once = {artifact.path: artifact for artifact in artifacts}.values()
    problems = [problem for artifact in once for problem in file_problems(artifact)]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CorruptArtifact(
            f"an input is not what was published:\n{listed}{more}\n"
            "Rebuild it with --force, or restore the file, then run again."
        )


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
    """Re-hash an artifact and everything upstream of it; also check that each consumer's pins still hold."""
    checked: list[str] = []
    problems: list[Problem] = []
    files = size = 0
    seen = {artifact.ref}
    todo = [artifact]
    while todo:
        one = todo.pop(0)
        checked.append(one.ref)
        files += len(one.record.files) + len(one.record.side_files)
        size += one.record.size
        problems += file_problems(one) + record_problems(one.record, str(one.path))
        for pin in one.record.inputs:
            found = _follow(store, one, pin, problems)
            if found is not None and found.ref not in seen:
                seen.add(found.ref)
                todo.append(found)
    return Verification(tuple(checked), files, size, tuple(dict.fromkeys(problems)))


def _follow(store: Store, reader: Artifact, pin: InputRef, problems: list[Problem]) -> Artifact | None:
    """Open a pinned input, noting what does not match the pin; None when it cannot be opened."""
    path = str(store.folder(pin.stage, pin.id))
    try:
        found = store.artifact(pin.stage, pin.id)
    except CorruptArtifact as error:
        problems.append(Problem(pin.ref, f"{path}/{RECORD}", "record", str(error)))
        return None
    except StoreError:
        problems.append(Problem(pin.ref, path, "missing", f"read by {reader.ref} but no longer in the store"))
        return None
    if found.record.record_digest != pin.record or found.digest != pin.digest:
        problems.append(
            Problem(pin.ref, f"{path}/{RECORD}", "record", f"not the record that {reader.ref} was built from")
        )
    return found
