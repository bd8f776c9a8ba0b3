"""Checkpoints of a stage in progress: written atomically, checked when read, the last two kept.

A checkpoint is a safetensors file and a small JSON marker beside it, written after it, that holds the file's
hash and the JSON state. What has no valid marker, or a marker whose hash does not match, does not count.
"""

from __future__ import annotations

import json
import logging
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra.config import canonical_json
from infra.errors import HeadwaterError
from infra.faults import fault
from infra.files import (
    WritePoints,
    atomic_path,
    atomic_write_bytes,
    fsync_dir,
    sha256_bytes,
    sha256_file,
    unshared,
)

_NAME = re.compile(r"step-(\d{10})\.json")
_POINTS = WritePoints("checkpoint.before", "checkpoint.during", "checkpoint.before_marker")


class Checkpoint(typing.NamedTuple):
    """What was saved: the step, torch tensors on the CPU by name, and the JSON state."""

    step: int
    tensors: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder, newest last.

    folder: made when missing; keep it under the stage's scratch.  keep: how many to hold (at least 1).
    log: where a skipped checkpoint is reported; the `headwater` logger by default.
    """

    def __init__(self, folder: Path, keep: int = 2, log: Callable[[str], None] | None = None) -> None:
        if keep < 1:
            raise HeadwaterError(f"checkpoints in {folder}: keep must be 1 or more, not {keep}")
        self.folder = folder
        self.keep = keep
        self._log = log or logging.getLogger("headwater").warning
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Save tensors (any device, dtype and stride) and a JSON state as the checkpoint of `step`.

        A crash at any instant leaves the earlier checkpoints as they were. Raises ConfigError naming the
        path of a state value that is not plain JSON.
        """
        import safetensors.torch

        canonical_json(dict(state))
        path = self._tensors_path(step)
        with atomic_path(path, _POINTS) as temporary:
            safetensors.torch.save_file(unshared(tensors), temporary)
        body = {"step": step, "sha256": sha256_file(path), "bytes": path.stat().st_size, "state": dict(state)}
        marker = {"digest": sha256_bytes(canonical_json(body)), **body}
        atomic_write_bytes(path.with_suffix(".json"), canonical_json(marker), points=None)
        fault("checkpoint.after")
        self._prune()

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, None when there is none; a torn or corrupt one is skipped with a log
        line.
        """
        import safetensors.torch

        for step in reversed(self.steps()):
            path = self._tensors_path(step)
            try:
                marker = json.loads(path.with_suffix(".json").read_bytes())
                body = {key: value for key, value in marker.items() if key != "digest"}
                if sha256_bytes(canonical_json(body)) != marker["digest"] or body["step"] != step:
                    raise ValueError("its marker was changed")
                if path.stat().st_size != body["bytes"] or sha256_file(path) != body["sha256"]:
                    raise ValueError("its tensors are not the ones that were saved")
            except (OSError, ValueError, KeyError, TypeError, AttributeError, HeadwaterError) as error:
                self._log(f"checkpoint {path.name} is skipped: {error}")
                continue
            return Checkpoint(step, safetensors.torch.load_file(path), body["state"])
        return None

    def steps(self) -> list[int]:
        """Steps that have a marker, ascending; whether they are whole shows when they are read."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _tensors_path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}.safetensors"

    def _prune(self) -> None:
        """Remove all but the newest: the marker first, so that what is half removed does not count."""
        kept = {self._tensors_path(step).stem for step in self.steps()[-self.keep :]}
        for suffix in (".json", ".safetensors"):
            for path in self.folder.glob(f"step-*{suffix}"):
                if path.stem not in kept:
                    path.unlink(missing_ok=True)
        for path in self.folder.glob(".step-*.tmp-*"):
            path.unlink(missing_ok=True)
        fsync_dir(self.folder)
