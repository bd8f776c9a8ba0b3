"""A local file or folder; in a git checkout only the files that git tracks."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from data.documents import Document
from data.sources.base import Candidate, Reading, Rejection
from data.sources.formats import as_candidate, format_of, read_file
from infra.errors import HeadwaterError

# Folders that hold other people's files, build results or caches.
_SKIPPED = frozenset(["__pycache__", "node_modules", "site-packages", "venv", "build", "dist"])


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
    """Every file below a folder whose name says text, JSON lines or Parquet. Hidden folders are left out."""

    name = "folder"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def candidates(self) -> list[Candidate]:
        found = []
        for here, folders, files in os.walk(self.folder, onerror=_refuse):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _SKIPPED)
            found += [Path(here, name) for name in files]
        return _candidates(self.folder, found)

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        return read_file(self.name, candidate, reading)


class GitSource:
    """The tracked files of a git checkout, as they are in the working tree."""

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
        return _candidates(self.folder, [self.folder / name for name in names])

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        return read_file(self.name, candidate, reading)


def _candidates(folder: Path, files: list[Path]) -> list[Candidate]:
    root = folder.resolve().name
    chosen = sorted(file for file in files if format_of(file))
    return [as_candidate(f"{root}/{file.relative_to(folder).as_posix()}", file) for file in chosen]


def _refuse(error: OSError) -> None:
    raise HeadwaterError(f"cannot list the folder {error.filename}: {error.strerror}")
