"""Documents: the unit of the corpus, and how they are stored and streamed.

A folder of documents holds 00000.parquet, 00001.parquet, ... with one row a document. Files are cut by
bytes of text, so that a reader that takes one file at a time holds a bounded amount in memory whatever
the corpus weighs.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import HeadwaterError
from infra.files import write_parquet

SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "path", "licence", "text")])
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "path", "reason")])
# Text bytes in one file: what a writer holds, and a reader of one file at most.
BYTES_PER_FILE = 16 << 20

_CODE_SUFFIXES = """
.awk .c .cc .cfg .cocci .conf .cpp .cs .css .cu .cuh .go .h .hpp .ini .java .jl .js .json .kt .lua .m
.mk .ml .php .pl .pm .py .pyi .r .rb .rs .scala .sh .sql .swift .toml .ts .tsx .vim .xml .yaml .yml
"""
CODE_SUFFIXES = frozenset(_CODE_SUFFIXES.split())

DOCSTRINGS = "#docstrings"  # ends the path of the prose of a module


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its origin. `path` is relative to its source and names a record as `file#index`."""

    id: str
    source: str
    path: str
    licence: str
    text: str

    @property
    def origin(self) -> str:
        """What documents that were cut from one file share."""
        return origin_of(self.path)

    @property
    def kind(self) -> str:
        """Code or text: which filters apply."""
        return kind_of(self.source, self.path)


def document_id(source: str, path: str, text: str) -> str:
    """16 hex digits of the SHA-256 of where the text stands and what it says."""
    digest = hashlib.sha256(f"{source}\0{path}\0".encode())
    digest.update(text.encode("utf-8"))
    return digest.hexdigest()[:16]


def make_document(source: str, path: str, licence: str, text: str) -> Document:
    return Document(document_id(source, path, text), source, path, licence, text)


def origin_of(path: str) -> str:
    """The file that a document was cut from: code and docstrings of one module have the same."""
    return path.removesuffix(DOCSTRINGS)


def kind_of(source: str, path: str) -> str:
    """Either "code" or "text", by the name of the source (`...-code`, `...-docstrings`) or the suffix."""
    if source.endswith("-docstrings"):
        return "text"
    if source.endswith("-code"):
        return "code"
    name = PurePosixPath(path.partition("#")[0])
    suffix = name.suffix if name.suffix not in (".gz", ".zst") else PurePosixPath(name.stem).suffix
    return "code" if suffix.lower() in CODE_SUFFIXES else "text"


class DocumentWriter:
    """Streams documents to a folder; holds at most about one file (16 MB of text) in memory.

    Use as a context manager, or call `close`.
    """

    def __init__(self, folder: Path, bytes_per_file: int = BYTES_PER_FILE) -> None:
        self.folder = folder
        self.documents = 0
        self.bytes = 0
        self._limit = bytes_per_file
        self._files = 0
        self._held = 0
        self._rows: list[Document] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, document: Document) -> None:
        size = len(document.text.encode("utf-8"))
        if self._rows and self._held + size > self._limit:
            self._flush()
        self._rows.append(document)
        self._held += size
        self.documents += 1
        self.bytes += size

    def close(self) -> None:
        if self._rows:
            self._flush()

    def _flush(self) -> None:
        columns = {name: [getattr(row, name) for row in self._rows] for name in SCHEMA.names}
        write_parquet(self.folder / f"{self._files:05d}.parquet", pa.table(columns, schema=SCHEMA))
        self._files += 1
        self._rows, self._held = [], 0

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()


def document_files(folder: Path) -> list[Path]:
    """The files of a folder of documents, in order. Raises HeadwaterError when there are none."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise HeadwaterError(f"no documents (*.parquet) in {folder}; the stage that made it kept nothing")
    return files


def iter_tables(folder: Path, columns: Sequence[str] = tuple(SCHEMA.names)) -> Iterator[pa.RecordBatch]:
    """Batches of up to 512 documents with the asked columns; one file is open at a time."""
    for path in document_files(folder):
        try:
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=512, columns=list(columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise HeadwaterError(f"{path} is not a readable document file: {error}") from error


def iter_documents(folder: Path) -> Iterator[Document]:
    """Every document of a folder, in the order written."""
    for batch in iter_tables(folder):
        for row in zip(*(batch.column(name).to_pylist() for name in SCHEMA.names), strict=True):
            yield Document(*row)


def write_rejected(path: Path, rows: Iterable[tuple[str, str, str, str]]) -> None:
    """List of documents that were not kept: (id, source, path, reason), in the order met."""
    table = list(zip(*rows, strict=True)) or [[], [], [], []]
    write_parquet(path, pa.table([pa.array(column, pa.string()) for column in table], schema=REJECTED_SCHEMA))
