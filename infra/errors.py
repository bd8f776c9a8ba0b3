"""The errors that are meant for people: each names a file, field or tensor and says what to do about it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


class HeadwaterError(Exception):
    """Something the user can act on. The command line prints the message without a traceback."""

    exit_code = 1


class ConfigError(HeadwaterError):
    """A configuration value, preset, node or field is unknown, of the wrong kind or out of bounds."""


class StoreError(HeadwaterError):
    """The artifact store cannot do what was asked: unknown reference, bad name, unreadable record."""


class UnknownReference(StoreError):
    """A reference names nothing in the store, or more than one thing."""


class CorruptArtifact(StoreError):
    """Bytes of a published artifact are not the bytes that its record lists."""


class BuildError(HeadwaterError):
    """A stage could not be built."""


class DiskFull(BuildError):
    """A write met a full disk or quota; nothing was published."""


class BuildInterrupted(BuildError):
    """Ctrl-C or SIGTERM stopped a build; its scratch folder is in place and the next try resumes."""

    exit_code = 130


def nearest(name: str, valid: Iterable[str], limit: int = 5) -> str:
    """Say which valid names come nearest to `name`, as the tail of an error message.

    Close spellings come first; where none is close, all of a short list or the start of a long one is given.
    """
    names = sorted(set(valid))
    if not names:
        return "there are none yet"
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    close += [other for other in names if name and name in other and other not in close]
    if close:
        return "did you mean " + ", ".join(close[:limit]) + "?"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return "there are: " + ", ".join(names[:12]) + more


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and everything it was raised from or while handling, without going round in circles."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            todo += list(one.exceptions)


# Libraries written in Rust and C++ (safetensors, tokenizers, arrow, torch) keep the text and lose the number.
_FULL_TEXTS = ("no space left on device", "os error 28", "disk quota exceeded", "os error 122")
_TORCH_WRITER = "pytorchstreamwriter"


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether `error` comes from a full disk or quota under `folder`."""
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(one).lower()
        if any(full in text for full in _FULL_TEXTS):
            return True
        # torch.save says only that its writer failed: believe it when the disk is in fact full.
        if _TORCH_WRITER in text and (free_bytes(folder) or 0) < 1 << 20:
            return True
    return False


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user can still write on the file system of `folder` (or of its nearest parent)."""
    for one in (folder, *folder.parents):
        if one.exists():
            try:
                return shutil.disk_usage(one).free
            except OSError:
                return None
    return None


@contextlib.contextmanager
def disk_full_told(folder: Path, doing: str) -> Iterator[None]:
    """Turn whatever a full disk under `folder` makes the block raise into DiskFull, saying what to do."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_disk_full(error, folder):
            raise
        raise DiskFull(_disk_full_message(_full_folder(error, folder), doing)) from error


def _full_folder(error: BaseException, otherwise: Path) -> Path:
    """The folder whose disk is full, where the error names a file (it may be a temporary one elsewhere)."""
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) and one.filename:
            path = Path(os.fsdecode(one.filename))
            if path.is_absolute():
                return path.parent
    return otherwise


def _disk_full_message(folder: Path, doing: str) -> str:
    """Where, how much is left, and what frees some."""
    free = free_bytes(folder)
    left = "an unknown number of" if free is None else f"{free:,}"
    return (
        f"no space left while {doing}: {os.fspath(folder)} has {left} bytes free. Nothing was published. "
        "Free some space (`headwater gc` lists what no name and no recent run needs) or point HEADWATER_HOME "
        "at a larger disk, then run the same command again: it resumes."
    )
