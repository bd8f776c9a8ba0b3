"""Writing files so that a crash leaves the old file or the new one, never half; hashing; deterministic
formats.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.config import canonical_json
from infra.errors import HeadwaterError
from infra.faults import fault, torn

if TYPE_CHECKING:
    import pyarrow

# Rows per Parquet row group: large enough to compress well, small enough to stream on a laptop.
ROW_GROUP = 16384
_CHUNK = 1 << 20


@dataclass(frozen=True)
class WritePoints:
    """The fault points that one kind of atomic write passes."""

    before: str
    during: str
    after: str


PAYLOAD = WritePoints("payload.before_write", "payload.during_write", "payload.after_write")
NAMES = WritePoints("names.before_write", "names.during_write", "names.after_write")


def fsync_dir(folder: Path) -> None:
    """Make the names in `folder` (files created, renamed, removed) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make the bytes of `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """`fsync` every file and folder below and including `folder`."""
    for here, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(here, name))
        fsync_dir(Path(here))


@contextlib.contextmanager
def atomic_path(path: Path, points: WritePoints | None = PAYLOAD) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; on leaving, fsync it and rename it over `path`.

    For libraries that write a file in one call (safetensors, tokenizers, arrow). Parent folders are made. On
    an exception the temporary file is removed and `path` is as it was. `points` are the fault points passed,
    None for files that are no part of an artifact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    if points:
        fault(points.before)
    try:
        yield temporary
        if points:
            torn(points.during, temporary)
        fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)
    if points:
        fault(points.after)


def atomic_write_bytes(path: Path, data: bytes, points: WritePoints | None = PAYLOAD) -> Path:
    """Write `data` to `path`; a reader or a crash sees the old bytes or the new ones. Returns `path`."""
    with atomic_path(path, points) as temporary:
        temporary.write_bytes(data)
    return path


def atomic_write_text(path: Path, text: str, points: WritePoints | None = PAYLOAD) -> Path:
    """`atomic_write_bytes` of UTF-8 text with the line ends as they are."""
    return atomic_write_bytes(path, text.encode("utf-8"), points)


def render_json(value: Any) -> bytes:
    """JSON for people and for hashing alike: sorted keys, two-space indent, UTF-8, one final newline.

    Raises ConfigError naming the path of a value that is not plain JSON.
    """
    canonical_json(value)
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode(
        "utf-8"
    )


def atomic_write_json(path: Path, value: Any, points: WritePoints | None = PAYLOAD) -> Path:
    """Write a plain JSON value deterministically and atomically. Returns `path`."""
    return atomic_write_bytes(path, render_json(value), points)


def read_json(path: Path) -> Any:
    """Read JSON; HeadwaterError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HeadwaterError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise HeadwaterError(f"{path}: not readable as JSON ({error})") from error


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_parquet(path: Path, table: pyarrow.Table) -> Path:
    """Write a table as Parquet whose bytes depend on the rows alone (for one version of arrow).

    zstd at level 3, row groups of `ROW_GROUP` rows, and no schema metadata: pandas and `datasets` put
    versions and paths there. Returns `path`.
    """
    import pyarrow.parquet

    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(
            table.combine_chunks().replace_schema_metadata(None),
            temporary,
            compression="zstd",
            compression_level=3,
            row_group_size=ROW_GROUP,
            store_schema=False,
            version="2.6",
        )
    return path


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> Path:
    """Write torch or numpy tensors as safetensors whose bytes depend on the values alone. Returns `path`.

    `metadata` (plain JSON) goes under the single key "headwater": the format keeps metadata in a hash map, so
    two keys would come out in either order. Tensors that share memory are written once each.
    """
    packed = {"headwater": canonical_json(dict(metadata)).decode()} if metadata is not None else None
    kinds = {type(tensor).__module__.partition(".")[0] for tensor in tensors.values()}
    with atomic_path(path) as temporary:
        if kinds <= {"numpy"}:
            import numpy
            import safetensors.numpy

            arrays = {name: numpy.ascontiguousarray(array) for name, array in sorted(tensors.items())}
            safetensors.numpy.save_file(arrays, temporary, packed)
        else:
            import safetensors.torch

            safetensors.torch.save_file(unshared(tensors), temporary, packed)
    return path


def unshared(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Contiguous CPU torch tensors with a storage of their own each, as safetensors wants them."""
    result, seen = {}, set()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        result[name] = flat
    return result


def read_tensors_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write_tensors` stored, {} if there is none; reads the header only."""
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    return json.loads(header.get("__metadata__", {}).get("headwater", "{}"))
