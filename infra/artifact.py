"""An artifact: a published folder and its record, as a stage reads it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import CorruptArtifact, HeadwaterError, nearest
from infra.files import read_json
from infra.record import Record, read_record


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage made, immutable once published."""

    path: Path
    record: Record

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Open a published folder; StoreError or CorruptArtifact when its record is missing or changed."""
        return cls(folder, read_record(folder))

    @property
    def stage(self) -> str:
        return self.record.stage

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def ref(self) -> str:
        """The reference `stage@id`."""
        return self.record.ref

    @property
    def digest(self) -> str:
        """Digest of the deterministic payload."""
        return self.record.digest

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Deterministic figures that the stage recorded."""
        return self.record.metrics

    def names(self, pattern: str = "*") -> list[str]:
        """Relative paths of the listed files that match a shell pattern (`*` crosses folders), sorted."""
        entries = (*self.record.files, *self.record.side_files)
        return sorted(entry.path for entry in entries if fnmatch.fnmatchcase(entry.path, pattern))

    def file(self, name: str) -> Path:
        """The path of one file of the artifact.

        Raises HeadwaterError when the record lists no such file, CorruptArtifact when the file has gone
        missing.
        """
        if not any(entry.path == name for entry in (*self.record.files, *self.record.side_files)):
            raise HeadwaterError(f"{self.ref} holds no file {name!r}; {nearest(name, self.names())}")
        return self._present(name)

    def _present(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise CorruptArtifact(
                f"{self.ref}: {path} is listed in the record but missing; restore it, or build "
                f"{self.stage} again with --force"
            )
        return path

    def files(self, pattern: str) -> list[Path]:
        """The paths of all listed files that match a shell pattern, sorted; at least one.

        Raises HeadwaterError when nothing matches.
        """
        found = self.names(pattern)
        if not found:
            raise HeadwaterError(
                f"{self.ref} holds no file that matches {pattern!r}; {nearest(pattern, self.names())}"
            )
        return [self._present(name) for name in found]

    def folder(self, name: str) -> Path:
        """The path of a sub-folder of the artifact that holds at least one listed file."""
        self.files(f"{name.rstrip('/')}/*")
        return self.path / name

    def json(self, name: str) -> Any:
        """The content of a JSON file of the artifact."""
        return read_json(self.file(name))
