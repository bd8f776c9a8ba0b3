"""Building one artifact: find it in the store, or run its stage and publish the result by one rename.

A crash at any instant leaves either no artifact or a whole one. What a try does is in
infra.attempt.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra import mend
from infra.artifact import Artifact
from infra.attempt import Attempt, Events, Say, interrupts
from infra.config import StageConfig, split
from infra.diff import Identity, why
from infra.errors import BuildError, CorruptArtifact, disk_full_told
from infra.fingerprint import artifact_id, fingerprint
from infra.imports import drift, module_digests, source_file
from infra.index import note_published
from infra.stage import SourceFile, Stage, check_inputs, sources_summary
from infra.store import Store
from infra.verify import file_problems


@dataclass(frozen=True)
class Plan:
    """What building would do: reuse `hit`, or build `id`."""

    stage: str
    fingerprint: str
    id: str
    # The newest artifact of this fingerprint, None if there is none or it cannot be used (see problem).
    hit: Artifact | None
    # Code files that changed since the hit was built, by name.
    drift: tuple[str, ...]
    # Without a hit: what differs from the nearest earlier artifact.
    why: tuple[str, ...]
    sources: tuple[SourceFile, ...] = field(default=(), repr=False)
    # Why the artifact in place cannot be reused, "" when there is nothing wrong.
    problem: str = ""
    # How many attempts were in the store.
    attempts: int = 0


@dataclass(frozen=True)
class BuildResult:
    """status: built, resumed (built on an earlier try's scratch) or cached."""

    artifact: Artifact
    status: str
    seconds: float


def plan(
    store: Store,
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, Sequence[Artifact]],
) -> Plan:
    """Find out whether an artifact is in the store, and if not, why not. Writes nothing, imports no torch.

    Raises ConfigError for a config value without a deterministic form, BuildError for inputs that do not fit.
    """
    if not isinstance(config, stage.config):
        raise BuildError(f"{stage.name}: expected a {stage.config.__name__}, not {type(config).__name__}")
    given = check_inputs(stage, inputs)
    identity, _ = split(config)
    sources = tuple(stage.scan(config)) if stage.scan else ()
    summary = sources_summary(sources) if stage.scan else {}
    digests = {role: [one.digest for one in artifacts] for role, artifacts in given.items()}
    mark = fingerprint(stage.name, stage.version, identity, digests, summary.get("digest", ""))
    attempts = store.attempts(stage.name, mark)
    if attempts:
        id = attempts[-1][1]
        try:
            hit = store.artifact(stage.name, id)
            if hit.record.fingerprint != mark:
                raise CorruptArtifact(
                    f"{hit.ref} is of another fingerprint that starts alike; move it out of the store"
                )
            bad = file_problems(hit, hash_content=False)
            if bad:
                raise CorruptArtifact(str(bad[0]))
        except CorruptArtifact as error:
            return Plan(stage.name, mark, id, None, (), (), sources, str(error), len(attempts))
        current = module_digests(source_file(stage.run))
        changed = drift(hit.record.code["modules"], current)
        return Plan(stage.name, mark, id, hit, changed, (), sources, attempts=len(attempts))
    shown = {role: [(one.ref, one.digest) for one in artifacts] for role, artifacts in given.items()}
    reasons = why(store, stage.name, Identity(stage.version, identity, shown, summary))
    return Plan(stage.name, mark, artifact_id(mark), None, (), reasons, sources)


def build(
    store: Store,
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, Sequence[Artifact]],
    *,
    force: bool = False,
    refresh: bool = False,
    prefect: Mapping[str, Any] | None = None,
    events: Events | None = None,
) -> BuildResult:
    """Return the artifact of a stage, config and inputs, building it if it is not in the store.

    force: make a new attempt beside the old one.  refresh: do so only if the code changed since.
    prefect: id and URL of the Prefect run, for the record.  events: see StageContext.
    Two processes that build the same thing build it once: the second waits, then reuses.

    Raises CorruptArtifact naming an input (or the artifact in place) whose files are not what was published,
    DiskFull, BuildInterrupted on Ctrl-C or SIGTERM (scratch is kept; the next try resumes), and whatever the
    stage itself raises.
    """
    began = time.monotonic()
    say = Say(events)
    with disk_full_told(store.home, f"building {stage.name}"):
        return _build(store, stage, config, inputs, force, refresh, dict(prefect or {}), say, began)


def _build(
    store: Store,
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, Sequence[Artifact]],
    force: bool,
    refresh: bool,
    prefect: dict[str, Any],
    say: Say,
    began: float,
) -> BuildResult:
    given = check_inputs(stage, inputs)
    made = plan(store, stage, config, inputs)
    if made.problem and not force:
        raise CorruptArtifact(f"{made.problem}\n{mend.advice(store, f'{made.stage}@{made.id}')}")
    wanted = force or made.hit is None or (refresh and bool(made.drift))
    if not wanted and made.hit is not None:
        sweep(store, made)
        return _cached(made.hit, made.drift, say, began)
    with store.lock(
        stage.name, made.fingerprint, waiting=lambda who: say(f"waiting for {who}, which builds it")
    ):
        now = store.attempts(stage.name, made.fingerprint)
        if len(now) > made.attempts:
            return _cached(store.artifact(stage.name, now[-1][1]), (), say, began)
        reasons = made.why or (("forced",) if force else (f"code changed: {', '.join(made.drift)}",))
        for reason in reasons:
            say(f"building {stage.name}: {reason}")
        attempt = now[-1][0] + 1 if now else 1
        work = Attempt(
            store, stage, config, given, made.fingerprint, made.sources, attempt, refresh, prefect, say
        )
        with interrupts(work):
            artifact = work.run()
    note_published(store, artifact)
    if made.hit is not None and made.hit.digest != artifact.digest:
        _tell_difference(made, artifact, say)
    return BuildResult(artifact, "resumed" if work.resumed else "built", time.monotonic() - began)


def _cached(artifact: Artifact, changed: Sequence[str], say: Say, began: float) -> BuildResult:
    if changed:
        say(
            f"{artifact.ref} is reused, though code has changed since it was built: {', '.join(changed)} "
            "(--refresh rebuilds)",
            "warning",
        )
    return BuildResult(artifact, "cached", time.monotonic() - began)


def _tell_difference(made: Plan, artifact: Artifact, say: Say) -> None:
    """Say that a new attempt came out differently, in which files, and what is known of the reason."""
    assert made.hit is not None
    before = {entry.path: entry.sha256 for entry in made.hit.record.files}
    now = {entry.path: entry.sha256 for entry in artifact.record.files}
    files = sorted(path for path in {*before, *now} if before.get(path) != now.get(path))
    listed = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    if made.drift:
        reason = f"code changed: {', '.join(made.drift)}"
    elif made.hit.record.environment["numerics"] != artifact.record.environment["numerics"]:
        reason = "the numerics class (device, threads, versions) is another"
    else:
        reason = "same code, same numerics class: the stage is not deterministic"
    say(f"{artifact.ref} differs from {made.hit.ref} in {listed} ({reason})", "warning")


def sweep(store: Store, made: Plan) -> None:
    """Remove what a process that died just after publishing a hit left in work/."""
    work = store.work(made.id)
    if made.hit is not None and work.exists():
        with store.lock(made.stage, made.fingerprint, wait=False) as free:
            if free:
                shutil.rmtree(work, ignore_errors=True)
