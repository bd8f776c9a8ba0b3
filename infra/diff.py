"""What differs between two records, field by field; and why something is not in the store yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.artifact import Artifact
from infra.config import canonical_json
from infra.errors import StoreError
from infra.imports import drift
from infra.record import InputRef, Record

if TYPE_CHECKING:
    from infra.store import Store

# In the order they are told: what makes another artifact comes first.
KINDS = ("identity", "placement", "code", "environment", "result")


@dataclass(frozen=True)
class Difference:
    """One field that differs. kind identity: the fingerprint covers it; kind result: it is what came out."""

    kind: str
    field: str
    left: str
    right: str

    def __str__(self) -> str:
        return f"{self.field}: {self.left} -> {self.right}"


@dataclass(frozen=True)
class Identity:
    """What a fingerprint is made of, in a form that can be compared and shown."""

    version: int
    config: Mapping[str, Any]
    # role -> (reference, payload digest) of each input
    inputs: Mapping[str, Sequence[tuple[str, str]]]
    sources: Mapping[str, Any]

    @classmethod
    def of(cls, record: Record) -> Identity:
        """The identity of what a record describes."""
        inputs: dict[str, list[tuple[str, str]]] = {}
        for one in record.inputs:
            inputs.setdefault(one.role, []).append((one.ref, one.digest))
        return cls(record.version, record.config["identity"], inputs, record.sources)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted path, leaf)` of a JSON value. A list of plain values is one leaf, an empty dict too."""
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from flatten(value[key], f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(one, (Mapping, list, tuple)) for one in value):
        for i, one in enumerate(value):
            yield from flatten(one, f"{path}[{i}]")
    else:
        yield path, value


def _text(value: Any) -> str:
    return (
        canonical_json(value).decode()
        if not isinstance(value, tuple)
        else canonical_json(list(value)).decode()
    )


def _leaves(kind: str, name: str, left: Any, right: Any) -> list[Difference]:
    """Differences between two JSON values, leaf by leaf."""
    a, b = dict(flatten(left, name)), dict(flatten(right, name))
    paths = sorted({*a, *b})
    # A part that is there on one side only shows through its leaves, not as an empty parent too.
    paths = [path for path in paths if not any(other.startswith((f"{path}.", f"{path}[")) for other in paths)]
    return [
        Difference(
            kind, path, _text(a[path]) if path in a else "(none)", _text(b[path]) if path in b else "(none)"
        )
        for path in paths
        if path not in a or path not in b or _text(a[path]) != _text(b[path])
    ]


def identity_differences(a: Identity, b: Identity) -> list[Difference]:
    """The fields that make two fingerprints of one stage differ. Inputs are compared by digest, shown by
    reference.
    """
    found = _leaves("identity", "version", a.version, b.version)
    found += _leaves("identity", "config", a.config, b.config)
    for role in sorted({*a.inputs, *b.inputs}):
        left, right = a.inputs.get(role, ()), b.inputs.get(role, ())
        for i in range(max(len(left), len(right))):
            one = left[i] if i < len(left) else ("(none)", "")
            two = right[i] if i < len(right) else ("(none)", "")
            if one[1] != two[1]:
                name = f"inputs.{role}" + (f"[{i}]" if max(len(left), len(right)) > 1 else "")
                found.append(Difference("identity", name, _shown(one, two), _shown(two, one)))
    if a.sources.get("digest") != b.sources.get("digest"):
        found.append(Difference("identity", "sources", _sources(a.sources), _sources(b.sources)))
    return found


def _shown(one: tuple[str, str], other: tuple[str, str]) -> str:
    """A reference, with its digest where the reference alone would look the same."""
    return one[0] if one[0] != other[0] else f"{one[0]} (digest {one[1][:12]})"


def _sources(sources: Mapping[str, Any]) -> str:
    if not sources:
        return "(none)"
    return f"{sources['files']} files, {sources['bytes']:,} bytes (digest {sources['digest'][:12]})"


def diff(a: Record, b: Record) -> list[Difference]:
    """Every field in which two records differ, those that the fingerprint covers first.

    Times, references and digests of the records themselves are left out: they always differ.
    """
    found = _leaves("identity", "stage", a.stage, b.stage)
    found += identity_differences(Identity.of(a), Identity.of(b))
    found += _leaves("placement", "config", a.config["placement"], b.config["placement"])
    found += _leaves("code", "commit", a.code["commit"], b.code["commit"])
    modules_a, modules_b = a.code["modules"], b.code["modules"]
    for name in drift(modules_a, modules_b):
        path = name.partition(" ")[0]
        left, right = modules_a.get(path, "(none)")[:12], modules_b.get(path, "(none)")[:12]
        found.append(Difference("code", path, left, right))
    found += _leaves("environment", "environment", a.environment, b.environment)
    found += _leaves("result", "metrics", a.metrics, b.metrics)
    found += _leaves("result", "digest", a.digest[:12], b.digest[:12])
    return sorted(found, key=lambda one: KINDS.index(one.kind))


def causes(store: Store, a: Record, b: Record) -> list[tuple[str, Difference]]:
    """Trace identity differences upstream to where they began: `(node path, difference)`.

    Where an input differs, its own record is compared in turn; the path says through which roles ("" for the
    records themselves). An input that is no longer in the store ends the trace.
    """
    found: list[tuple[str, Difference]] = []
    seen: set[tuple[str, str]] = set()

    def walk(path: str, one: Record, two: Record) -> None:
        for difference in identity_differences(Identity.of(one), Identity.of(two)):
            pair = _input_pair(difference.field, one, two)
            if pair is None:
                found.append((path, difference))
                continue
            if (pair[0].ref, pair[1].ref) in seen:
                continue
            seen.add((pair[0].ref, pair[1].ref))
            try:
                inner = [store.artifact(pin.stage, pin.id).record for pin in pair]
            except StoreError:
                found.append((path, difference))
                continue
            step = difference.field.removeprefix("inputs.")
            before = len(found)
            if inner[0].stage == inner[1].stage:
                walk(f"{path}/{step}".lstrip("/"), inner[0], inner[1])
            if len(found) == before:
                found.append((path, difference))

    walk("", a, b)
    return found


def _input_pair(field: str, a: Record, b: Record) -> tuple[InputRef, InputRef] | None:
    """The two inputs that a difference in `inputs.role` or `inputs.role[i]` speaks of, if both sides have
    one.
    """
    if not field.startswith("inputs."):
        return None
    role, _, index = field.removeprefix("inputs.").partition("[")
    i = int(index.rstrip("]")) if index else 0
    sides = [[one for one in record.inputs if one.role == role] for record in (a, b)]
    if any(i >= len(side) for side in sides):
        return None
    return sides[0][i], sides[1][i]


def nearest_record(store: Store, stage: str, identity: Identity) -> tuple[Artifact, list[Difference]] | None:
    """The artifact of the same stage that differs in the fewest fields (the newest of equals), and those
    fields.
    """
    best: tuple[int, Artifact, list[Difference]] | None = None
    for artifact in sorted(store.artifacts(stage), key=lambda one: one.record.finished, reverse=True):
        differences = identity_differences(Identity.of(artifact.record), identity)
        if best is None or len(differences) < best[0]:
            best = (len(differences), artifact, differences)
    return (best[1], best[2]) if best else None


def why(store: Store, stage: str, identity: Identity) -> tuple[str, ...]:
    """Why an identity is not in the store: lines that name what differs from the nearest earlier artifact."""
    nearest = nearest_record(store, stage, identity)
    if nearest is None:
        return (f"first {stage} in this store",)
    artifact, differences = nearest
    if not differences:
        return (f"same as {artifact.ref} (built by request)",)
    return tuple(f"{one} (nearest earlier: {artifact.ref})" for one in differences)
