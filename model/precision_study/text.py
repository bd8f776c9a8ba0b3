"""The text of the comparison: Python's own standard library, which every machine that runs this has.

Bytes are tokens. Files come in the order of a hash of their names, so that a limit takes a mixture and the
held-out text is of the same kind as the rest.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from infra.errors import HeadwaterError


def standard_library(limit: int) -> bytes:
    """Up to `limit` bytes of the standard library's source files, a zero byte after each file.

    Raises:
        HeadwaterError: this Python has less of it.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    names = []
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "site-packages"]
        names += [Path(inside, file).relative_to(folder).as_posix() for file in files if file.endswith(".py")]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    parts, size = [], 0
    for name in names:
        if size >= limit:
            break
        parts.append((folder / name).read_bytes() + b"\0")
        size += len(parts[-1])
    if size < limit:
        raise HeadwaterError(
            f"{folder} holds {size:,} bytes of Python sources and {limit:,} are needed: use a Python with "
            "its whole standard library, or a smaller setting"
        )
    return b"".join(parts)[:limit]


class Rows:
    """Rows of `length` bytes of a text, in the order that `seed` gives; another epoch repeats that order."""

    def __init__(self, text: bytes, length: int, seed: int | None = None) -> None:
        count = len(text) // length
        if count == 0:
            raise ValueError(f"Rows: the text has {len(text)} bytes, a row {length}; pass more text")
        whole = torch.frombuffer(bytearray(text[: count * length]), dtype=torch.uint8)
        self.rows = whole.view(count, length)
        self.order = (
            torch.arange(count)
            if seed is None
            else torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        )

    def stream(self, start: int, count: int) -> dict[str, Tensor]:
        tokens_BT = self.rows[self.order[torch.arange(start, start + count) % len(self.order)]].int()
        return {
            "tokens": tokens_BT,
            "segments": torch.zeros_like(tokens_BT),
            "loss": torch.ones_like(tokens_BT, dtype=torch.uint8),
        }
