"""Which reader a file gets, by its name."""

from collections.abc import Iterator
from pathlib import Path

from data.documents import CODE_SUFFIXES, Document, make_document
from data.sources.base import Candidate, Reading, Rejection, candidate, read_text
from data.sources.records import read_jsonl, read_parquet

_TEXT_SUFFIXES = """
.adoc .csv .htm .html .log .md .org .rst .tex .text .tsv .txt
"""
TEXT_SUFFIXES = CODE_SUFFIXES | frozenset(_TEXT_SUFFIXES.split())
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
# Files that are text though their names have no suffix.
_TEXT_NAMES = """
authors changelog changes contributing copying copyright dockerfile install licence license makefile
news notice readme thanks todo
"""
TEXT_NAMES = frozenset(_TEXT_NAMES.split())


def format_of(file: Path) -> str:
    """One of "jsonl", "parquet" and "text", or "" for names that say nothing of the kind."""
    name = Path(file.stem) if file.suffix in (".gz", ".zst") else Path(file.name)
    suffix = name.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    if suffix == ".parquet" and name.name == file.name:
        return "parquet"
    if suffix in TEXT_SUFFIXES or name.name.lower().partition(".")[0] in TEXT_NAMES:
        return "text"
    return ""


def as_candidate(name: str, file: Path) -> Candidate:
    return candidate(name, file, records=format_of(file) in ("jsonl", "parquet"))


def read_file(source: str, one: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
    """The documents of a file of any known format; a file of unknown format is read as text."""
    if one.problem:
        yield Rejection(one.name, one.problem)
        return
    kind = format_of(one.file)
    if kind == "jsonl":
        yield from read_jsonl(source, one, reading)
    elif kind == "parquet":
        yield from read_parquet(source, one, reading)
    else:
        found = read_text(one, reading.max_document_bytes)
        yield found.rejection or make_document(source, one.name, reading.licence, found.text)
