"""One try at one artifact: a work folder, the stage's run, and publishing by one rename.

A crash at any instant leaves either no artifact or a whole one. `payload/` is emptied at the start of each
try, `scratch/` is kept so that the next try can resume.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import hardware
from infra.artifact import Artifact
from infra.config import StageConfig, canonical_json, split
from infra.errors import BuildError, BuildInterrupted, HeadwaterError, is_disk_full
from infra.faults import fault
from infra.files import WritePoints, atomic_write_bytes, atomic_write_json, read_json, sha256_bytes
from infra.fingerprint import artifact_id
from infra.imports import code_state, drift
from infra.names import utc_now
from infra.record import RECORD, InputRef, Record, hash_files, payload_digest
from infra.stage import SourceFile, Stage, StageContext, sources_summary
from infra.store import Store
from infra.verify import require_intact

Events = Callable[[dict[str, Any]], None]
_RECORD_POINTS = WritePoints("publish.before_record", "publish.during_record", "publish.after_record")
_TRY = "try.json"
_LOG = "stage.log"
_SOURCES = "sources.json"


class Say:
    """Sends log lines to whoever watches and, once a build is under way, to its log file."""

    def __init__(self, events: Events | None) -> None:
        self.events = events
        self.file: Path | None = None
        self._early: list[str] = []

    def __call__(self, message: str, level: str = "info") -> None:
        self.send({"event": "log", "level": level, "message": message})

    def send(self, event: dict[str, Any]) -> None:
        """Pass on an event; log lines are kept too."""
        if event["event"] == "log":
            self._early.append(f"{utc_now()} {event['level']}: {event['message']}\n")
            if self.file is not None:
                # A file name that is no UTF-8 gets into messages as lone surrogates.
                with self.file.open("a", encoding="utf-8", errors="backslashreplace") as handle:
                    handle.writelines(self._early)
                self._early.clear()
        if self.events is not None:
            self.events(event)


@dataclass
class Attempt:
    """One try at one artifact, under its lock."""

    store: Store
    stage: Stage
    config: StageConfig
    inputs: Mapping[str, tuple[Artifact, ...]]
    fingerprint: str
    sources: tuple[SourceFile, ...]
    attempt: int
    refresh: bool
    prefect: dict[str, Any]
    say: Say
    resumed: bool = False

    def __post_init__(self) -> None:
        self._device: str = getattr(self.config, "device", "")
        self.id = artifact_id(self.fingerprint, self.attempt)
        self.folder = self.store.work(self.id)
        self.payload = self.folder / "payload"
        self.scratch = self.folder / "scratch"

    def run(self) -> Artifact:
        """Check the inputs, run the stage, publish."""
        started = utc_now()
        # A whole stage would have run before publishing found out.
        self.store.require_place(self.stage.name, self.id)
        self._take_intact()
        code = code_state(self.stage.run)
        tries = self._prepare(started, code["modules"])
        context = StageContext(
            config=self.config,
            inputs=self.inputs,
            out=self.payload,
            scratch=self.scratch,
            fingerprint=self.fingerprint,
            resumed=self.resumed,
            sources=self.sources,
            events=self.say.send,
        )
        hardware.reset_peak_memory()
        clock, cpu = time.monotonic(), hardware.cpu_seconds()
        self.stage.run(self.config, context)
        timings = {
            **context.timings,
            "seconds": time.monotonic() - clock,
            "cpu_seconds": hardware.cpu_seconds() - cpu,
            "peak_memory_bytes": float(hardware.peak_memory_bytes()),
        }
        return self._publish(started, code, tries, context.metrics, timings)

    def _take_intact(self) -> None:
        """Read only what is as published; another attempt with the same bytes stands in for a damaged one."""
        given = [one for artifacts in self.inputs.values() for one in artifacts]
        taken = dict(zip((one.path for one in given), require_intact(self.store, given), strict=True))
        for one in given:
            if taken[one.path] is not one:
                self.say(f"{one.ref} is damaged; {taken[one.path].ref}, the same bytes, is read", "warning")
        self.inputs = {
            role: tuple(taken[one.path] for one in artifacts) for role, artifacts in self.inputs.items()
        }

    def _prepare(self, started: str, modules: dict[str, str]) -> list[dict[str, Any]]:
        """Make the work folder ready and note this try in it. Returns all tries so far, this one last."""
        earlier = self._earlier_tries(modules)
        self.resumed = self.scratch.is_dir() and any(self.scratch.iterdir())
        if self.payload.exists():
            shutil.rmtree(self.payload)
        self.payload.mkdir(parents=True)
        self.scratch.mkdir(exist_ok=True)
        this = {
            "started": started,
            "code": sha256_bytes(canonical_json(modules)),
            "numerics": hardware.numerics_class(self._device),
        }
        note = {
            "stage": self.stage.name,
            "fingerprint": self.fingerprint,
            "inputs": [one.ref for artifacts in self.inputs.values() for one in artifacts],
            "modules": modules,
            "tries": [*earlier, this],
        }
        atomic_write_json(self.folder / _TRY, note, points=None)
        self.say.file = self.folder / _LOG
        if self.resumed and earlier and earlier[-1]["numerics"] != this["numerics"]:
            was = canonical_json(earlier[-1]["numerics"]).decode()
            self.say(
                f"resuming in another numerics class, results may differ in the last bits; was {was}",
                "warning",
            )
        self.say(
            f"try {len(earlier) + 1} of {self.stage.name}@{self.id}" + (", resuming" if self.resumed else "")
        )
        return note["tries"]

    def _earlier_tries(self, modules: dict[str, str]) -> list[dict[str, Any]]:
        """The tries noted in the work folder. Scratch that this build must not go on from is removed."""
        if not self.folder.exists():
            return []
        try:
            note = read_json(self.folder / _TRY)
            changed = drift(note["modules"], modules)
            if note["fingerprint"] != self.fingerprint:
                raise HeadwaterError("it belongs to another build")
        except (HeadwaterError, KeyError, TypeError) as error:
            self.say(f"what is left in {self.folder} is removed: {error}", "warning")
            shutil.rmtree(self.folder)
            return []
        if changed and self.refresh:
            self.say(f"starting afresh: code changed since the last try: {', '.join(changed)}")
            shutil.rmtree(self.folder)
            return []
        if changed:
            self.say(
                f"resuming what other code began (--refresh starts afresh); changed: {', '.join(changed)}",
                "warning",
            )
        return list(note["tries"])

    def _publish(
        self,
        started: str,
        code: dict[str, Any],
        tries: list[dict[str, Any]],
        metrics: dict[str, Any],
        timings: dict[str, float],
    ) -> Artifact:
        """Hash the payload, write its record, move both into the store at once, remove the work folder."""
        identity, placement = split(self.config)
        if self.sources:
            path = self.payload / _SOURCES
            if path.exists():
                raise BuildError(
                    f"{self.stage.name}: {_SOURCES} is the scan's own file; write under another name"
                )
            atomic_write_json(path, [[one.path, one.bytes, one.sha256] for one in sorted(self.sources)])
        logs = self.payload / "logs"
        logs.mkdir(exist_ok=True)
        # What is said from here on goes to whoever watches, no longer into the artifact.
        self.say.file = None
        shutil.copyfile(self.folder / _LOG, logs / _LOG)
        if (self.payload / RECORD).exists():
            raise BuildError(f"{self.stage.name}: it wrote a {RECORD} of its own; write under another name")
        files, side = hash_files(self.payload)
        if not files:
            raise BuildError(f"{self.stage.name}: it finished without writing any file under out/")
        record = Record(
            stage=self.stage.name,
            version=self.stage.version,
            id=self.id,
            attempt=self.attempt,
            fingerprint=self.fingerprint,
            digest=payload_digest(files),
            inputs=tuple(
                InputRef(role, one.stage, one.id, one.digest, one.record.record_digest)
                for role, artifacts in self.inputs.items()
                for one in artifacts
            ),
            sources=sources_summary(self.sources) if self.stage.scan else {},
            config={"identity": identity, "placement": placement},
            seed=self.config.seed,
            code=code,
            environment=hardware.environment(self._device),
            files=files,
            side_files=side,
            metrics=metrics,
            timings=timings,
            started=started,
            finished=utc_now(),
            tries=tuple(tries),
            prefect=self.prefect,
        )
        atomic_write_bytes(self.payload / RECORD, record.render(), _RECORD_POINTS)
        artifact = self.store.publish(self.payload, record, before=lambda: fault("publish.before_rename"))
        fault("publish.after_rename")
        # Whatever cannot be removed now goes with the next cached build or gc: the artifact is published.
        shutil.rmtree(self.folder, ignore_errors=True)
        fault("publish.after_cleanup")
        return artifact


class _Terminated(KeyboardInterrupt):
    """SIGTERM, turned into an exception so that a build ends tidily."""


@contextlib.contextmanager
def interrupts(work: Attempt) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an error that says what is left and how to go on."""
    name = f"{work.stage.name}@{work.id}"
    with _sigterm():
        try:
            yield
        except KeyboardInterrupt as error:
            how = "SIGTERM" if isinstance(error, _Terminated) else "Ctrl-C"
            raise BuildInterrupted(
                f"{name} was stopped by {how}. Nothing was published; its work so far is kept in "
                f"{work.scratch}. Run the same command again to resume."
            ) from None
        except Exception as error:
            if is_disk_full(error, work.store.home):
                # The payload is made anew by the next try; scratch holds the checkpoints.
                shutil.rmtree(work.payload, ignore_errors=True)
            elif not isinstance(error, HeadwaterError):
                error.add_note(f"while building {name}; its work so far is kept in {work.scratch}")
            raise


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """Raise on SIGTERM inside the block, unless this is not the main thread or the program handles it
    already.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return

    owner = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            # A forked child of the stage inherits the handler; it must die as if it had none.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
