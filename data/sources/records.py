"""Files that hold many documents: JSON lines and Parquet.

Where a cap asks for a share of the documents, each record is taken or left by the hash of its name, so
that the share is an even sample of the file and a larger share contains the smaller one.
"""

import io
import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from data.documents import Document, make_document
from data.hashing import unit
from data.sources.base import (
    UNREADABLE,
    Candidate,
    Reading,
    Rejection,
    check_text,
    open_bytes,
    printable,
    too_large,
    unreadable,
)

OVER_CAP = "left out under max_bytes"
# A line of JSON is longer than the text in it: escapes and the other fields. Beyond this it is not parsed.
_LINE_SLACK = 1 << 20


def line_limit(reading: Reading) -> int:
    """The longest line that is parsed."""
    return 2 * reading.max_document_bytes + _LINE_SLACK


def skip_line(handle: io.BufferedIOBase, line: bytes) -> None:
    """Go to the end of a line that begins with `line`, in steps."""
    while line and not line.endswith(b"\n"):
        line = handle.readline(_LINE_SLACK)


def read_jsonl(source: str, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
    """One document a line. A line far beyond the size limit is skipped in steps and never held whole."""
    limit = line_limit(reading)
    index = -1
    try:
        with open_bytes(candidate.file) as handle:
            while line := handle.readline(limit + 1):
                index += 1
                name = f"{candidate.name}#{index}"
                if len(line) > limit:
                    skip_line(handle, line)
                    yield Rejection(name, too_large(reading.max_document_bytes), of_all=True)
                    continue
                if not line.strip():
                    continue
                if unit("record", name) >= reading.share:
                    yield Rejection(name, OVER_CAP, quarantined=False)
                    continue
                yield _parse_line(source, name, line, reading)
    except UNREADABLE as error:
        yield Rejection(f"{candidate.name}#{index + 1}", unreadable(error))


def _parse_line(source: str, name: str, line: bytes, reading: Reading) -> Document | Rejection:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Rejection(name, f"invalid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError):
        return Rejection(name, "invalid JSON")
    if not isinstance(record, dict):
        return Rejection(name, "invalid JSON: not an object")
    return from_record(source, name, record, reading)


def from_record(source: str, name: str, record: dict, reading: Reading) -> Document | Rejection:
    """A document from a record's fields."""
    text = record.get(reading.text_field)
    if not isinstance(text, str):
        return no_text(name, list(record), reading)
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return Rejection(name, "invalid Unicode: half of a surrogate pair")
    if size > reading.max_document_bytes:
        return Rejection(name, too_large(reading.max_document_bytes))
    licence = record.get(reading.licence_field) if reading.licence_field else None
    licence = printable(licence) if isinstance(licence, str) and licence else reading.licence
    return check_text(name, text) or make_document(source, name, licence, text)


def no_text(name: str, fields: Sequence[object], reading: Reading) -> Rejection:
    """The rejection of a record without one field of text, with the fields that it has."""
    listed = ", ".join(sorted(printable(str(key)) for key in fields)[:8])
    return Rejection(name, f"no text in field {reading.text_field!r} (set text_field; it has: {listed})")


def wanted_columns(names: Sequence[str], reading: Reading) -> list[str]:
    """The columns of a table to read: text, and licence if it has one; [] if not exactly one holds text."""
    if names.count(reading.text_field) != 1:
        return []
    licence = {reading.licence_field} - {reading.text_field}
    return [reading.text_field, *(name for name in licence if names.count(name) == 1)]


def footer(file: pq.ParquetFile) -> pq.FileMetaData:
    """What a Parquet file says of itself; ArrowInvalid if its counts contradict each other."""
    metadata = file.metadata
    if metadata.num_rows != sum(metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)):
        raise pa.ArrowInvalid("the row groups do not add up to the rows of the file")
    return metadata


def read_parquet(source: str, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
    """One document a row, read in batches; the largest thing held is one column chunk of a row group."""
    try:
        with pq.ParquetFile(candidate.file, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            columns = wanted_columns(names, reading)
            if not columns:
                reason = no_text(candidate.name, names, reading).reason
                yield from lost_rows(candidate.name, 0, footer(file).num_rows, reason, reading)
                return
            first = 0
            for group in range(footer(file).num_row_groups):
                yield from _read_group(source, candidate.name, file, group, first, columns, reading)
                first += file.metadata.row_group(group).num_rows
    except UNREADABLE as error:  # no footer
        yield Rejection(candidate.name, unreadable(error))


def _read_group(
    source: str,
    name: str,
    file: pq.ParquetFile,
    group: int,
    first: int,
    columns: list[str],
    reading: Reading,
) -> Iterator[Document | Rejection]:
    """The rows of one row group. Each stands alone: where one is damaged, the next may be whole."""
    index, end = first, first + file.metadata.row_group(group).num_rows
    reason = "unreadable: row group shorter than the footer says"
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
            for row in range(batch.num_rows):
                yield parse_row(source, f"{name}#{index}", batch, row, reading)
                index += 1
    except UNREADABLE as error:
        reason = unreadable(error)
    yield from lost_rows(name, index, end, reason, reading)


def lost_rows(name: str, first: int, end: int, reason: str, reading: Reading) -> Iterator[Rejection]:
    """Rows that cannot be read, in one rejection; those that the cap leaves out anyway say nothing."""
    rows = range(first, end)
    tried = (
        sum(unit("record", f"{name}#{row}") < reading.share for row in rows)
        if reading.share < 1
        else end - first
    )
    if tried:
        place = f"{name}#{first}-{end - 1}" if end - first > 1 else f"{name}#{first}"
        yield Rejection(place, reason, count=tried)
    if tried < end - first:
        yield Rejection(name, OVER_CAP, quarantined=False, count=end - first - tried)


def parse_row(
    source: str, name: str, batch: pa.RecordBatch, row: int, reading: Reading
) -> Document | Rejection:
    """A document from a row of a table, unless the cap leaves it out."""
    if unit("record", name) >= reading.share:
        return Rejection(name, OVER_CAP, quarantined=False)
    try:
        record = {column: batch.column(column)[row].as_py() for column in batch.schema.names}
    except UnicodeDecodeError as error:
        return Rejection(name, f"invalid UTF-8 at byte {error.start}")
    return from_record(source, name, record, reading)
