"""Text under /usr/share/doc: manuals, changelogs and readmes of the packages of a Debian-like system.

The folder does not exist everywhere, and minimal images strip it; then this source is empty.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data.documents import Document
from data.sources.base import Candidate, Reading, Rejection, candidate, closed_folder
from data.sources.formats import format_of, read_file

LICENCE = "see /usr/share/doc/<package>/copyright"
_SUFFIXES = frozenset([".adoc", ".md", ".org", ".rst", ".tex", ".text", ".txt"])


class SysdocsSource:
    """Prose in /usr/share/doc, packed or not; pages in HTML and example programs are left out."""

    name = "sysdocs"

    def __init__(self, folder: Path = Path("/usr/share/doc")) -> None:
        self.folder = folder

    def candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        closed: list[OSError] = []
        if not self.folder.is_dir():
            return found
        for here, folders, files in os.walk(self.folder, onerror=closed.append):
            folders.sort()
            for name in files:
                file = Path(here, name)
                if self._wanted(file):
                    found.append(candidate(f"doc/{file.relative_to(self.folder).as_posix()}", file))
        for error in closed:
            inside = Path(error.filename).relative_to(self.folder)
            found.append(closed_folder(f"doc/{inside.as_posix()}", error))
        return sorted(found, key=lambda one: one.name)

    def _wanted(self, file: Path) -> bool:
        if os.path.islink(file) or format_of(file) != "text":
            return False
        name = file.stem if file.suffix == ".gz" else file.name
        return (
            Path(name).suffix.lower() in _SUFFIXES or "." not in name or name.lower().startswith("changelog")
        )

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        return read_file(self.name, candidate, Reading(**{**vars(reading), "licence": LICENCE}))
