"""Where a store's bytes live: the few operations whose atomicity everything else rests on.

`LocalStorage` serves local and shared POSIX disks. An object store would implement the same protocol with the
conditional put of an artifact's record as the commit and a lease as the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from infra.errors import StoreError
from infra.files import NAMES, atomic_write_bytes, fsync_dir, fsync_tree

_POLL_SECONDS = 0.05

# Descriptors of held locks. A forked child closes its copies, or a worker that outlives a killed stage would
# hold the stage's lock for ever.
_held: set[int] = set()


def _close_held() -> None:
    for handle in list(_held):
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


class Storage(Protocol):
    """Put-if-absent of a folder, replace of a small document, and a lock; keys use forward slashes."""

    def commit(self, staged: Path, key: str, before: Callable[[], None]) -> Path:
        """Make the staged folder appear whole under `key`; FileExistsError if something is there."""

    def read(self, key: str) -> bytes | None:
        """The document under `key`, None if there is none."""

    def replace(self, key: str, data: bytes) -> None:
        """Write or overwrite the document under `key` at once."""

    def keys(self, prefix: str, suffix: str) -> list[str]:
        """Keys of documents below `prefix/` that end in `suffix`, sorted."""

    def lock(
        self, name: str, wait: bool = True, waiting: Callable[[str], None] | None = None
    ) -> AbstractContextManager[bool]:
        """Hold the lock `name`; yields False at once when `wait` is off and another process holds it."""


class LocalStorage:
    """A folder on a local or shared disk."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def commit(self, staged: Path, key: str, before: Callable[[], None] = lambda: None) -> Path:
        """Fsync the staged folder and rename it to `key`; `before` is called between the two.

        Raises FileExistsError if `key` is taken, StoreError if the two lie on different file systems.
        """
        target = self.home / key
        target.parent.mkdir(parents=True, exist_ok=True)
        fsync_tree(staged)
        before()
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise FileExistsError(errno.EEXIST, "already there", str(target)) from None
            if error.errno == errno.EXDEV:
                raise StoreError(
                    f"{staged} and {target.parent} lie on different file systems, so an artifact cannot be "
                    "published by one rename: keep work/ and artifacts/ of a store on one"
                ) from None
            raise
        for folder in (target.parent, target.parent.parent, staged.parent):
            fsync_dir(folder)
        return target

    def read(self, key: str) -> bytes | None:
        try:
            return (self.home / key).read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, key: str, data: bytes) -> None:
        atomic_write_bytes(self.home / key, data, NAMES)

    def keys(self, prefix: str, suffix: str) -> list[str]:
        folder = self.home / prefix
        found = (path.relative_to(self.home).as_posix() for path in folder.rglob(f"*{suffix}"))
        # Temporary files of a write in progress start with a dot.
        return sorted(key for key in found if not key.rpartition("/")[2].startswith("."))

    @contextlib.contextmanager
    def lock(
        self, name: str, wait: bool = True, waiting: Callable[[str], None] | None = None
    ) -> Iterator[bool]:
        """Hold an exclusive lock on `locks/<name>.lock`; it goes when the process dies, however it dies.

        `waiting` is called once with a description of the holder when the lock is not free at once.
        """
        path = self.home / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(handle)
        try:
            told = False
            while not _try_lock(handle):
                if not wait:
                    yield False
                    return
                if not told and waiting is not None:
                    waiting(_holder(path))
                told = True
                time.sleep(_POLL_SECONDS)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            yield True
        finally:
            # A forked child has closed its copy already; there, nothing is left to do.
            if handle in _held:
                _held.discard(handle)
                os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    """Who wrote the lock file last, for a message; the file's content decides nothing."""
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
