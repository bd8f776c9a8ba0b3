"""The artifact store: a folder of immutable artifacts, the names that point at them, and the work in
progress.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from infra.artifact import Artifact
from infra.errors import StoreError, UnknownReference, nearest
from infra.fingerprint import ID_LENGTH
from infra.imports import ROOT
from infra.names import Names
from infra.record import RECORD, Record
from infra.storage import LocalStorage
from infra.verify import require_unchanged

_ID = re.compile(rf"([0-9a-f]{{{ID_LENGTH}}})(?:-([1-9][0-9]*))?")
_FORMS = "a reference is run/node, a promoted name, stage@id or the path of an artifact's folder"


def default_home() -> Path:
    """`$HEADWATER_HOME`, or `.headwater/` in the checkout."""
    given = os.environ.get("HEADWATER_HOME", "")
    return Path(given) if given else ROOT / ".headwater"


class Store:
    """An artifact store in a folder, made on first use."""

    def __init__(self, home: Path | str | None = None) -> None:
        given = home if home is not None else default_home()
        try:
            self.home = Path(given).expanduser().absolute()
        except RuntimeError:
            raise StoreError(f"{given}: there is no such user; set HEADWATER_HOME to a folder") from None
        if self.home.exists() and not self.home.is_dir():
            raise StoreError(f"{self.home} is a file; point HEADWATER_HOME at a folder")
        self.storage = LocalStorage(self.home)
        self.names = Names(self.storage, self.home)

    # Artifacts

    def folder(self, stage: str, id: str) -> Path:
        """Where an artifact lies or would lie."""
        return self.home / "artifacts" / stage / id

    def work(self, id: str) -> Path:
        """Where an artifact is made: payload/ and scratch/ inside."""
        return self.home / "work" / id

    def stages(self) -> list[str]:
        """Names of the stages that have artifacts here."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in (self.home / "artifacts").iterdir() if path.is_dir())
        return []

    def ids(self, stage: str) -> list[str]:
        """Ids of a stage's artifacts (folders that have a record), sorted."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder = self.home / "artifacts" / stage
            return sorted(path.name for path in folder.iterdir() if (path / RECORD).is_file())
        return []

    def refs(self) -> list[str]:
        """`stage@id` of every artifact, whether its record can be read or not."""
        return [f"{stage}@{id}" for stage in self.stages() for id in self.ids(stage)]

    def artifact(self, stage: str, id: str) -> Artifact:
        """Open an artifact; UnknownReference when there is none, CorruptArtifact when its record was
        changed.
        """
        folder = self.folder(stage, id)
        if not (folder / RECORD).is_file():
            raise UnknownReference(
                f"no artifact {stage}@{id} in {self.home}; {nearest(f'{stage}@{id}', self.refs())}"
            )
        return Artifact.open(folder)

    def artifacts(self, stage: str = "") -> Iterator[Artifact]:
        """Every artifact whose record can be read, of one stage or of all."""
        for name in [stage] if stage else self.stages():
            for id in self.ids(name):
                with contextlib.suppress(StoreError):
                    yield self.artifact(name, id)

    def broken(self) -> dict[str, str]:
        """References of artifacts whose records cannot be read, and why."""
        found = {}
        for ref in self.refs():
            stage, _, id = ref.partition("@")
            try:
                self.artifact(stage, id)
            except StoreError as error:
                found[ref] = str(error)
        return found

    def attempts(self, stage: str, fingerprint: str) -> list[tuple[int, str]]:
        """`(attempt, id)` of the artifacts of one fingerprint, ascending; records are not read."""
        found = []
        for id in self.ids(stage):
            match = _ID.fullmatch(id)
            if match and match[1] == fingerprint[:ID_LENGTH]:
                found.append((int(match[2] or 1), id))
        return sorted(found)

    def lock(
        self, stage: str, fingerprint: str, wait: bool = True, waiting: Callable[[str], None] | None = None
    ) -> AbstractContextManager[bool]:
        """The lock of one fingerprint; see `LocalStorage.lock`."""
        return self.storage.lock(f"{stage}-{fingerprint[:ID_LENGTH]}", wait, waiting)

    def publish(self, payload: Path, record: Record, before: Callable[[], None] = lambda: None) -> Artifact:
        """Move a payload that holds its record.json into the store by one rename.

        Raises StoreError if something is in its place.
        """
        try:
            folder = self.storage.commit(payload, f"artifacts/{record.stage}/{record.id}", before)
        except FileExistsError:
            raise StoreError(self._in_the_way(record.stage, record.id)) from None
        return Artifact.open(folder)

    def require_place(self, stage: str, id: str) -> None:
        """StoreError when an artifact could not be published because something is in its place."""
        folder = self.folder(stage, id)
        # A rename goes over an empty folder.
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise StoreError(self._in_the_way(stage, id))

    def _in_the_way(self, stage: str, id: str) -> str:
        return (
            f"{self.folder(stage, id)} is in the way of {stage}@{id}: it has appeared since this build "
            f"began, or is no artifact; move it elsewhere if it holds no {RECORD}"
        )

    def strays(self) -> list[Path]:
        """What lies among the artifacts and is none, for it holds no record."""
        found = []
        for stage in self.stages():
            folder = self.home / "artifacts" / stage
            found += [path for path in folder.iterdir() if not (path / RECORD).is_file()]
        return sorted(found)

    # References

    def resolve(self, ref: str) -> Artifact:
        """The artifact that a reference names: `run/node`, a name, `stage@id` (or a prefix), a path.

        Raises UnknownReference listing the nearest valid ones, also when the reference means two things.
        """
        if "@" in ref and "/" not in ref:
            return self._by_id(ref)
        if ref.startswith(("/", "./", "../", "~")) or ref in (".", ".."):
            return self._by_path(ref)
        found = {}
        name = self.names.get(ref)
        if name is not None:
            found[f"the promoted name {ref}"] = name["artifact"]
        entry = self._node(ref)
        if entry is not None and entry["artifact"]:
            found[f"the run's node {ref}"] = entry["artifact"]
        if len(set(found.values())) > 1:
            listed = "; ".join(f"{what} is {target}" for what, target in found.items())
            raise UnknownReference(f"{ref!r} means two things: {listed}. Give the stage@id instead")
        for what, target in found.items():
            stage, _, id = target.partition("@")
            if not (self.folder(stage, id) / RECORD).is_file():
                raise UnknownReference(
                    f"{what} points at {target}, which is no longer in the store; build it again"
                )
            return self.artifact(stage, id)
        # os.path finds no file where pathlib would raise, for an overlong name.
        if os.path.isfile(Path(ref) / RECORD):
            return self._by_path(ref)
        raise UnknownReference(self._unknown(ref))

    def own(self, ref: str) -> Artifact:
        """Like `resolve`, for what is to be named or read by a build: it must lie in this store.

        Raises StoreError saying what to do for the path of an artifact elsewhere, unless this store has it.
        """
        artifact = self.resolve(ref)
        here = self.folder(artifact.stage, artifact.id)
        if os.path.realpath(artifact.path) == os.path.realpath(here):
            return artifact
        if (here / RECORD).is_file():
            mine = self.artifact(artifact.stage, artifact.id)
            if mine.record.record_digest == artifact.record.record_digest:
                return mine
        other = self.around(artifact).home
        where = (
            "" if other == self.home else f" but in {other}: work there (--home {other}), or build it here"
        )
        raise StoreError(
            f"{ref} does not lie in the store {self.home}{where}. What a name or an input means must be in "
            "the store, with all that it was made from"
        )

    def around(self, artifact: Artifact) -> Store:
        """The store that an artifact lies in, which is another one for a path; this one for a lone copy."""
        folder = Path(os.path.realpath(artifact.path))
        if folder.parts[-3:] != ("artifacts", artifact.stage, artifact.id):
            return self
        home = folder.parents[2]
        return self if home == Path(os.path.realpath(self.home)) else Store(home)

    def promote(self, ref: str, name: str, by: str = "") -> Artifact:
        """Point a name at what `ref` means, keeping the name's history. Returns the artifact.

        Raises StoreError for a name that a run's node already answers to, or for an artifact elsewhere,
        CorruptArtifact when its files are not what was published.
        """
        artifact = self.own(ref)
        require_unchanged(self, artifact)
        if self._node(name) is not None:
            raise StoreError(f"{name!r} is a node of a run; promote under another name")
        self.names.promote(artifact, name, by)
        return artifact

    def _node(self, ref: str) -> dict[str, Any] | None:
        run, slash, node = ref.partition("/")
        document = self.names.run(run) if slash else None
        return document["nodes"].get(node) if document else None

    def _by_id(self, ref: str) -> Artifact:
        stage, _, id = ref.partition("@")
        ids = self.ids(stage)
        if not ids:
            raise UnknownReference(
                f"no artifact {ref}: nothing of stage {stage!r} here; {nearest(stage, self.stages())}"
            )
        if id in ids:
            return self.artifact(stage, id)
        matching = [one for one in ids if one.startswith(id)] if id else []
        if len(matching) == 1:
            return self.artifact(stage, matching[0])
        if matching:
            listed = ", ".join(f"{stage}@{one}" for one in matching)
            raise UnknownReference(f"{ref} is the start of several: {listed}")
        raise UnknownReference(f"no artifact {ref}; {nearest(ref, [f'{stage}@{one}' for one in ids])}")

    @staticmethod
    def _by_path(ref: str) -> Artifact:
        path = Path(os.path.expanduser(ref))
        folder = path.parent if path.name == RECORD else path
        if not os.path.isfile(folder / RECORD):
            raise UnknownReference(f"{folder}: not an artifact (it has no {RECORD}); {_FORMS}")
        return Artifact.open(folder.absolute())

    def _unknown(self, ref: str) -> str:
        """Why a reference means nothing, with what comes nearest."""
        runs = self.names.runs([])
        run, slash, node = ref.partition("/")
        if run in runs:
            nodes = {f"{run}/{one}" for one, entry in runs[run]["nodes"].items() if entry["artifact"]}
            if not slash:
                return f"{ref!r} is a run; name one of its nodes: {nearest('', nodes)}"
            if node in runs[run]["nodes"]:
                status = runs[run]["nodes"][node]["status"]
                return f"node {node!r} of run {run!r} has built nothing yet ({status})"
            return f"run {run!r} has no node {node!r}; {nearest(ref, nodes)}"
        valid = [*self.names.all([]), *self.refs()]
        valid += [f"{one}/{node}" for one, document in runs.items() for node in document["nodes"]]
        return f"{ref!r} means nothing in {self.home}; {nearest(ref, valid)} ({_FORMS})"


def open_store(home: Path | str | None = None, write: bool = True) -> Store:
    """The store at `home` (default: `$HEADWATER_HOME`), its folder made and found writable.

    write: off to look only; a home that cannot be written, or is not there yet, is then as good as any.
    Raises StoreError naming the folder when it cannot be written.
    """
    store = Store(home)
    if not write:
        return store
    try:
        store.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{store.home}: cannot be made ({error}); set HEADWATER_HOME to a writable folder"
        ) from None
    if not os.access(store.home, os.W_OK):
        raise StoreError(f"{store.home}: not writable; set HEADWATER_HOME to a writable folder")
    return store
