"""What nothing needs any more: artifacts that no name and no recent run reaches, work that nobody came back
to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from infra.artifact import Artifact
from infra.errors import CorruptArtifact, HeadwaterError, StoreError
from infra.files import read_json

if TYPE_CHECKING:
    from infra.store import Store

_TRASH = "trash-"


@dataclass(frozen=True)
class Garbage:
    """One folder that could go. ref is `stage@id` of an artifact, "" for a folder under work/."""

    path: Path
    ref: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Sweep:
    """kept: references that something needs, and what that is; garbage: the rest; strays: what lies among the
    artifacts, is none, and is somebody's to judge: it is never removed.
    """

    kept: dict[str, str]
    garbage: tuple[Garbage, ...]
    strays: tuple[Path, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes that removing the garbage frees."""
        return sum(one.bytes for one in self.garbage)


def plan_gc(store: Store, runs: int = 10, min_age_hours: float = 1.0, work_days: float = 14.0) -> Sweep:
    """Find what can go, removing nothing.

    Kept are: what a promoted name points at, what the `runs` last updated runs hold, what a build in
    progress reads, anything younger than `min_age_hours` (a run in progress may not have noted it yet), and
    everything upstream of all these. Work folders go when they were not touched for `work_days`, or when
    their artifact is there.

    Raises StoreError when a record among what is kept cannot be read, a newer Headwater's included: what lies
    upstream of it is not known then, and must not be taken for garbage.
    """
    if runs < 0 or min_age_hours < 0 or work_days < 0:
        raise HeadwaterError("gc: runs, hours and days must be 0 or more")
    kept: dict[str, str] = {}
    artifacts: dict[str, Artifact] = {}
    unread: dict[str, StoreError] = {}
    for ref in store.refs():
        stage, _, id = ref.partition("@")
        try:
            artifacts[ref] = store.artifact(stage, id)
        except StoreError as error:
            unread[ref] = error

    def keep(refs: Iterable[str], reason: str) -> None:
        todo = [(ref, reason) for ref in refs if ref]
        while todo:
            ref, because = todo.pop(0)
            if ref in kept:
                continue
            kept[ref] = because
            if ref in artifacts:
                todo += [(pin.ref, f"upstream of {ref}") for pin in artifacts[ref].record.inputs]

    for name, document in store.names.all().items():
        keep([document["artifact"]], f"promoted as {name}")
    for run, document in list(store.names.runs().items())[:runs]:
        keep([entry["artifact"] for entry in document["nodes"].values()], f"in run {run}")
    for folder in _work_folders(store):
        with contextlib.suppress(HeadwaterError, KeyError, TypeError):
            keep(read_json(folder / "try.json")["inputs"], f"read by {folder.name}, in progress")
    for ref, artifact in artifacts.items():
        age = time.time() - datetime.fromisoformat(artifact.record.finished).timestamp()
        if age < min_age_hours * 3600:
            keep([ref], f"made less than {min_age_hours:g} h ago")

    for ref, error in unread.items():
        # A changed record is nobody's any more; one that is whole but strange belongs to other code.
        if ref in kept or not isinstance(error, CorruptArtifact):
            raise StoreError(f"gc cannot tell what {ref} was built from, so it removes nothing: {error}")

    garbage = []
    made = {ref: artifact.record.finished for ref, artifact in artifacts.items()}
    # Newest first, so that what was read goes after its readers.
    for ref in sorted(store.refs(), key=lambda ref: made.get(ref, ""), reverse=True):
        if ref not in kept:
            stage, _, id = ref.partition("@")
            reason = (
                "no name and no recent run reaches it" if ref in artifacts else "its record cannot be read"
            )
            garbage.append(Garbage(store.folder(stage, id), ref, _size(store.folder(stage, id)), reason))
    for folder in _work_folders(store):
        reason = _work_reason(store, folder, work_days)
        if reason:
            garbage.append(Garbage(folder, "", _size(folder), reason))
    return Sweep(kept, tuple(garbage), tuple(store.strays()))


def collect(store: Store, sweep: Sweep) -> tuple[list[Garbage], list[tuple[Garbage, str]]]:
    """Remove the garbage of a sweep: `(removed, [(left, why)])`.

    Each folder first leaves its place by one rename, so that a crash leaves no half artifact. What is locked
    (being built or built again) stays.
    """
    removed, left = [], []
    (store.home / "work").mkdir(parents=True, exist_ok=True)
    for one in sweep.garbage:
        try:
            stage, fingerprint = _owner(store, one)
            with store.lock(stage, fingerprint, wait=False) as free:
                if not free:
                    left.append((one, "somebody is building it now"))
                    continue
                trash = store.home / "work" / f"{_TRASH}{one.path.name}-{os.getpid()}-{time.monotonic_ns()}"
                os.rename(one.path, trash)
            shutil.rmtree(trash)
        except FileNotFoundError:
            continue
        except OSError as error:
            left.append((one, str(error)))
            continue
        removed.append(one)
    return removed, left


def _owner(store: Store, one: Garbage) -> tuple[str, str]:
    """The stage and the start of the fingerprint whose lock guards a folder."""
    if one.ref:
        stage, _, id = one.ref.partition("@")
        return stage, id
    try:
        note = read_json(one.path / "try.json")
        return str(note["stage"]), str(note["fingerprint"])
    except (HeadwaterError, KeyError, TypeError):
        return "work", one.path.name


def _work_folders(store: Store) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in (store.home / "work").iterdir() if path.is_dir())
    return []


def _work_reason(store: Store, folder: Path, work_days: float) -> str:
    """Why a work folder can go, "" if it should stay."""
    if folder.name.startswith(_TRASH):
        return "left by an interrupted gc"
    try:
        stage = str(read_json(folder / "try.json")["stage"])
        store.artifact(stage, folder.name)
        return "its artifact is published"
    except (StoreError, HeadwaterError, KeyError, TypeError):
        pass
    newest = max(
        (path.stat().st_mtime for path in (folder, *folder.rglob("*")) if path.exists()), default=0.0
    )
    days = (time.time() - newest) / 86400
    return f"not touched for {days:.0f} days" if days >= work_days else ""


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
