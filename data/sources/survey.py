"""What a file of many records holds, found out without making documents of it.

The reader's count of records is checked against this one, a cap is weighed by it, and where a file is torn it
says how much of it nobody can read.
"""

import gzip
import io
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data.sources.arrow import ends_whole
from data.sources.base import UNREADABLE, Candidate, Reading, open_bytes
from data.sources.formats import format_of
from data.sources.records import footer, line_limit, skip_line, wanted_columns

# How finely the place of a tear in a packed file is known.
_STEP = 4096


@dataclass(frozen=True)
class Survey:
    """`records` is None where the file does not say, or breaks off before it could be counted."""

    records: int | None
    bytes: int  # of text or lines, unpacked, in records within the size limit
    lost: int = 0  # estimate of the bytes beyond a tear, at the same scale
    cut: bool = False  # the end is missing, and nothing says how much


def survey(candidate: Candidate, reading: Reading) -> Survey:
    """Count the records of a file, and weigh them; reads all of it but for Parquet, whose footer says it."""
    if candidate.problem:
        return Survey(None, 0)
    kind = format_of(candidate.file)
    if kind == "parquet":
        return _parquet(candidate, reading)
    return _lines(candidate, reading) if kind == "jsonl" else _arrow(candidate, reading)


def unpacked_bytes(candidate: Candidate, limit: int) -> int:
    """The size of a packed text whose headers need not say it; reads at most one byte beyond the limit."""
    try:
        with open_bytes(candidate.file) as handle:
            return len(handle.read(limit + 1))
    except UNREADABLE:
        return candidate.bytes


def _parquet(candidate: Candidate, reading: Reading) -> Survey:
    """The size of the column of text before compression: packed sizes are no measure of text."""
    try:
        with pq.ParquetFile(candidate.file) as file:
            metadata, size = footer(file), 0
            for place in range(metadata.num_row_groups):
                group = metadata.row_group(place)
                chunks = [group.column(column) for column in range(group.num_columns)]
                size += sum(
                    c.total_uncompressed_size for c in chunks if c.path_in_schema == reading.text_field
                )
            return Survey(metadata.num_rows, size)
    except UNREADABLE:  # the footer comes last: without it nothing can be read
        return Survey(None, 0, lost=candidate.packed, cut=True)


def _lines(candidate: Candidate, reading: Reading) -> Survey:
    limit = line_limit(reading)
    records = size = 0
    try:
        with candidate.file.open("rb") as raw:
            handle = _unpack(raw, candidate.file.suffix)
            try:
                while line := handle.readline(limit + 1):
                    if len(line) > limit:
                        skip_line(handle, line)
                    else:
                        size += len(line)
                    records += bool(line.strip()) or len(line) > limit
            except UNREADABLE as error:
                at = raw.tell()
                # zlib says when it misses the end; zstd does not, but it has then read all there is.
                all_read = candidate.file.suffix == ".zst" and at >= candidate.packed
                return _torn(candidate, size, at, all_read or isinstance(error, EOFError))
    except UNREADABLE:
        return Survey(None, 0, lost=candidate.packed)
    return Survey(records, size)


def _arrow(candidate: Candidate, reading: Reading) -> Survey:
    records = size = 0
    try:
        with pa.memory_map(str(candidate.file)) as mapped:
            try:
                stream = pa.ipc.open_stream(mapped)
                columns = wanted_columns(stream.schema.names, reading)
                for batch in stream:
                    records += batch.num_rows
                    size += batch.select(columns).nbytes
            except UNREADABLE:
                return _torn(candidate, size, mapped.tell(), not ends_whole(candidate.file))
        whole = ends_whole(candidate.file)
    except UNREADABLE:
        return Survey(None, 0, lost=candidate.packed)
    return Survey(records, size) if whole else Survey(None, size, cut=True)


def _torn(candidate: Candidate, size: int, at: int, cut: bool) -> Survey:
    """What is lost beyond the place `at`, if it is as dense as what came before."""
    if cut:
        return Survey(None, size, lost=0 if size else candidate.packed, cut=True)
    at = max(0, min(at, candidate.packed) - _STEP)  # it may be anywhere in the last step
    return Survey(None, size, lost=(candidate.packed - at) * size // at if at and size else candidate.packed)


class _Steps(io.RawIOBase):
    """Hands a file over in small steps, so that the file's place is close to what was unpacked."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self._raw.readinto(memoryview(buffer)[:_STEP])


def _unpack(raw: BinaryIO, suffix: str) -> io.BufferedIOBase:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=_Steps(raw), mode="rb")
    if suffix == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), 1 << 20)
    return raw
