"""What a source of documents is: a list of files, each read into documents one by one.

A source lists its candidates without reading them, so that a cap can choose among them first. Names are
relative to the source's own root and mean the same on every machine. Whatever cannot be read is handed
over as a rejection with its reason, never as an exception: one bad file must not end a run over a million
good ones.
"""

import gzip
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from data.documents import Document

# What the standard library and arrow raise on files that are missing, forbidden, torn or not what their
# name says.
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class Candidate:
    """One file that could be read."""

    name: str  # stable name, "json/decoder.py"
    file: Path
    bytes: int  # bytes of text, unpacked, as far as the file's size tells
    records: bool = False  # holds many documents, of which a share can be taken
    packed: int = 0  # bytes of the file as it is
    problem: str = ""  # why it can already be seen to be unreadable
    skipped: str = ""  # why its name says that it is not to be read


@dataclass(frozen=True)
class Rejection:
    """One thing that was met and not kept."""

    path: str
    reason: str
    quarantined: bool = True  # False: read well and left out on purpose
    count: int = 1  # how many documents it stands for
    of_all: bool = False  # found by looking at all documents, not only at the share that a cap takes


@dataclass(frozen=True)
class Reading:
    """How sources are read."""

    text_field: str = "text"
    licence_field: str = ""
    licence: str = "unknown"
    max_document_bytes: int = 2_000_000
    share: float = 1.0  # of the records of a file that holds many


class Source(Protocol):
    """A place that documents come from."""

    name: str

    def candidates(self) -> list[Candidate]:
        """Every file, those that are not to be read marked so; HeadwaterError when the place is wrong."""
        ...

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        """The documents of one file and what was rejected in it."""
        ...


@dataclass
class Text:
    """The text of a file, or why there is none."""

    text: str = ""
    rejection: Rejection | None = field(default=None)


def printable(text: str) -> str:
    """The text as valid Unicode: odd bytes of a file name as \\xNN, halves of surrogate pairs as \\uNNNN.

    Names and fields of records are stored and hashed, which takes Unicode that can be encoded.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a half that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def skip(name: str, file: Path, reason: str) -> Candidate:
    """A file or folder that is not to be read, to be counted under the reason."""
    return Candidate(printable(name), file, 0, skipped=reason)


def closed_folder(name: str, error: OSError) -> Candidate:
    """A folder whose files cannot be listed: one thing that cannot be read, as far as can be seen."""
    return Candidate(printable(f"{name}/"), Path(error.filename), 0, problem=unreadable(error))


def candidate(name: str, file: Path, records: bool = False) -> Candidate:
    """Look at a file's size without reading it."""
    name = printable(name)
    try:
        state = os.stat(file)
    except OSError as error:
        return Candidate(name, file, 0, problem=f"unreadable: {error.strerror}")
    if not stat.S_ISREG(state.st_mode):
        return Candidate(name, file, 0, problem="unreadable: not a regular file")
    packed = size = state.st_size
    if file.suffix == ".gz" and size >= 4:
        size = max(size, _unpacked_size(file))
    return Candidate(name, file, size, records, packed)


def _unpacked_size(file: Path) -> int:
    """The size modulo 4 GiB that gzip writes in its last four bytes; 0 if unreadable."""
    try:
        with file.open("rb") as handle:
            handle.seek(-4, os.SEEK_END)
            return struct.unpack("<I", handle.read(4))[0]
    except OSError:
        return 0


def open_bytes(file: Path) -> io.BufferedIOBase:
    """The bytes of a file, unpacked if its name ends in .gz or .zst."""
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(os.fspath(file)), "zstd"), 1 << 20)
    return file.open("rb")


def read_text(candidate: Candidate, limit: int) -> Text:
    """The whole file as text, if it is UTF-8 of at most `limit` bytes; reads no more than one byte beyond."""
    if candidate.problem:
        return Text(rejection=Rejection(candidate.name, candidate.problem))
    if candidate.bytes > limit and candidate.file.suffix != ".gz":  # a size in a .gz trailer may be a lie
        return Text(rejection=Rejection(candidate.name, too_large(limit)))
    try:
        with open_bytes(candidate.file) as handle:
            raw = handle.read(limit + 1)
    except UNREADABLE as error:
        return Text(rejection=Rejection(candidate.name, unreadable(error)))
    if len(raw) > limit:
        return Text(rejection=Rejection(candidate.name, too_large(limit)))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Text(rejection=Rejection(candidate.name, f"invalid UTF-8 at byte {error.start}"))
    return Text(text=text, rejection=check_text(candidate.name, text))


def check_text(path: str, text: str) -> Rejection | None:
    """Why a decoded text is not a document, None if it is one."""
    if not text.strip():
        return Rejection(path, "empty", quarantined=False)
    if "\0" in text:
        return Rejection(path, "binary: holds a NUL character")
    return None


def too_large(limit: int) -> str:
    return f"larger than max_document_bytes ({limit})"


def unreadable(error: BaseException) -> str:
    """A reason without addresses or paths of this machine, so that it is the same on every run."""
    if isinstance(error, OSError) and error.strerror:
        return f"unreadable: {error.strerror}"
    return f"unreadable: {type(error).__name__}"
