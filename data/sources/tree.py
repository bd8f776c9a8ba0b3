"""A local file or folder; in a git checkout only the files that git tracks."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from data.documents import Document
from data.sources.base import Candidate, Reading, Rejection, closed_folder, skip
from data.sources.formats import as_candidate, format_of, read_file
from infra.errors import HeadwaterError

# Folders that hold other people's files or build results.
_SKIPPED = frozenset(["node_modules", "site-packages", "venv", "build", "dist"])


class FileSource:
    """One file, whatever its name."""

    name = "file"

    def __init__(self, file: Path) -> None:
        self.file = file

    def candidates(self) -> list[Candidate]:
        return [as_candidate(self.file.name, self.file)]

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        return read_file(self.name, candidate, reading)


class TreeSource:
    """Every file below a folder whose name says text, JSON lines or Parquet.

    Other files, and folders of results and of other people's files, are counted as skipped. Hidden folders
    and __pycache__ are left out without a word: caches come and go, and are no part of what is read.
    """

    name = "folder"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        closed: list[OSError] = []
        for here, folders, files in os.walk(self.folder, onerror=closed.append):
            entered = []
            for name in folders:
                folder = Path(here, name)
                if name.startswith(".") or name == "__pycache__":
                    continue
                if name in _SKIPPED:
                    found.append(skip(f"{self._name(folder)}/", folder, f"folder named {name}"))
                elif os.path.islink(folder):  # pathlib raises where it may not look
                    found.append(skip(f"{self._name(folder)}/", folder, "link to a folder"))
                else:
                    entered.append(name)
            folders[:] = entered
            found += [_by_name(self._name(Path(here, name)), Path(here, name)) for name in files]
        for error in closed:
            if Path(error.filename) == self.folder:
                raise HeadwaterError(
                    f"cannot list the folder {self.folder}: {error.strerror}. Make it readable, or take it "
                    "out of sources"
                )
            found.append(closed_folder(self._name(Path(error.filename)), error))
        return sorted(found, key=lambda one: one.name)

    def _name(self, file: Path) -> str:
        return f"{self.folder.resolve().name}/{file.relative_to(self.folder).as_posix()}"

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        return read_file(self.name, candidate, reading)


class GitSource:
    """The tracked files of a git checkout whose names say text, as they are in the working tree."""

    name = "git"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def candidates(self) -> list[Candidate]:
        command = ["git", "-C", os.fspath(self.folder), "ls-files", "-z"]
        try:
            done = subprocess.run(command, capture_output=True, check=True)
        except FileNotFoundError:
            raise HeadwaterError(
                f"{self.folder} is a git checkout, but git is not installed: install git, or copy the files "
                "to a folder without .git"
            ) from None
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip()
            raise HeadwaterError(f"git cannot list the files of {self.folder}: {said}") from error
        names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
        root = self.folder.resolve().name
        return [_by_name(f"{root}/{name}", self.folder / name) for name in sorted(names)]

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        return read_file(self.name, candidate, reading)


def _by_name(name: str, file: Path) -> Candidate:
    """The file as a candidate, skipped if its name does not say that it holds text."""
    if format_of(file):
        return as_candidate(name, file)
    if os.path.isdir(file):  # in what git tracks
        return skip(name, file, "submodule or link to a folder")
    return skip(name, file, "unknown suffix" if file.suffix else "no suffix")
