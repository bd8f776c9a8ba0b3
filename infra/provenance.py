"""Lineage for the world outside: in-toto statements with SLSA provenance, and OpenLineage events.

Formats: in-toto Statement v1, SLSA provenance predicate v1, OpenLineage RunEvent 2-0-2.
"""

from __future__ import annotations

import http.client
import os
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.artifact import Artifact
from infra.config import canonical_json
from infra.errors import ConfigError, HeadwaterError
from infra.names import utc_now
from infra.record import Record

if TYPE_CHECKING:
    from infra.store import Store

_BUILD_TYPE = "urn:headwater:stage:v1"
_BUILDER = "urn:headwater:builder"
_RUN_EVENT = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
_NAMESPACE = "headwater"


def statement(store: Store, artifact: Artifact) -> dict[str, Any]:
    """An in-toto statement about every file of an artifact, with SLSA provenance of how it was built.

    Its resolved dependencies are all artifacts upstream (by payload digest), the code (commit and each
    module) and the constraints file. Plain JSON; write it beside the weights.
    """
    from infra.lineage import back

    record = artifact.record
    upstream = [node for ref, node in back(store, artifact).nodes.items() if ref != artifact.ref]
    dependencies = [{"uri": _uri(node.ref), "digest": {"sha256": node.digest}} for node in upstream]
    if record.code["commit"]:
        dependencies.append(
            {"uri": "git+urn:headwater:source", "digest": {"gitCommit": record.code["commit"]}}
        )
    dependencies += [
        {"uri": f"urn:headwater:source:{_quote(path)}", "digest": {"sha256": digest}}
        for path, digest in sorted(record.code["modules"].items())
    ]
    if record.environment["lock"]:
        dependencies.append(
            {"uri": "urn:headwater:constraints", "digest": {"sha256": record.environment["lock"]}}
        )
    if record.sources:
        dependencies.append({"uri": "urn:headwater:sources", "digest": {"sha256": record.sources["digest"]}})
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": entry.path, "digest": {"sha256": entry.sha256}} for entry in record.files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "stage": record.stage,
                    "version": record.version,
                    "config": dict(record.config["identity"]),
                    "inputs": [{"role": one.role, "uri": _uri(one.ref)} for one in record.inputs],
                },
                "internalParameters": {
                    "placement": dict(record.config["placement"]),
                    "environment": dict(record.environment),
                },
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": _BUILDER, "version": {"headwater": _version()}},
                "metadata": {
                    "invocationId": run_id(record),
                    "startedOn": record.started,
                    "finishedOn": record.finished,
                },
                "byproducts": [
                    {"name": entry.path, "digest": {"sha256": entry.sha256}} for entry in record.side_files
                ],
            },
        },
    }


def _version() -> str:
    try:
        return metadata.version("headwater")
    except metadata.PackageNotFoundError:
        return "unknown"


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="/")


def _uri(ref: str) -> str:
    stage, _, id = ref.partition("@")
    return f"urn:headwater:artifact:{_quote(stage)}:{_quote(id)}"


def run_id(record: Record) -> str:
    """A UUID of the try that made an artifact, the same whenever it is asked for."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_uri(record.ref)}#{record.started}"))


def lineage_event(
    kind: str,
    *,
    job: str,
    run: str,
    inputs: Sequence[Artifact] = (),
    outputs: Sequence[Artifact] = (),
    error: str = "",
) -> dict[str, Any]:
    """One OpenLineage run event.

    kind: START, RUNNING, COMPLETE, FAIL or ABORT.  job: the node, such as demo/pretrain.  run: the run's
    UUID. error: with FAIL, what went wrong.
    """
    if kind not in ("START", "RUNNING", "COMPLETE", "FAIL", "ABORT"):
        raise ConfigError(f"OpenLineage event {kind!r}: use START, RUNNING, COMPLETE, FAIL or ABORT")
    facets: dict[str, Any] = {}
    if error:
        schema = "https://openlineage.io/spec/facets/1-0-1/ErrorMessageRunFacet.json"
        facets["errorMessage"] = {
            "_producer": _BUILDER,
            "_schemaURL": schema,
            "message": error,
            "programmingLanguage": "python",
        }
    return {
        "eventType": kind,
        "eventTime": utc_now(),
        "run": {"runId": str(uuid.UUID(run)), "facets": facets},
        "job": {"namespace": _NAMESPACE, "name": job, "facets": {}},
        "inputs": [_dataset(one) for one in inputs],
        "outputs": [_dataset(one) for one in outputs],
        "producer": _BUILDER,
        "schemaURL": _RUN_EVENT,
    }


def completed(artifact: Artifact, inputs: Sequence[Artifact], job: str) -> dict[str, Any]:
    """The COMPLETE event of a built artifact; its inputs are the artifacts that its record pins."""
    return lineage_event("COMPLETE", job=job, run=run_id(artifact.record), inputs=inputs, outputs=[artifact])


def _dataset(artifact: Artifact) -> dict[str, Any]:
    version = {
        "_producer": _BUILDER,
        "_schemaURL": "https://openlineage.io/spec/facets/1-0-1/DatasetVersionDatasetFacet.json",
        "datasetVersion": artifact.digest,
    }
    return {"namespace": _NAMESPACE, "name": artifact.ref, "facets": {"version": version}}


def check_target(target: str) -> None:
    """ConfigError when events cannot be sent to a target of this kind."""
    try:
        scheme = urllib.parse.urlsplit(target).scheme
    except ValueError as error:
        raise ConfigError(f"OpenLineage target {target!r}: {error}") from None
    if scheme not in ("", "file", "http", "https"):
        raise ConfigError(f"OpenLineage target {target!r}: use http://, https:// or the path of a file")


def emit(event: Mapping[str, Any], target: str, timeout: float = 10.0) -> None:
    """Send an OpenLineage event where it was asked to go.

    target: `http(s)://host[:port]` (posted to its /api/v1/lineage, or to the path given), or the path of a
    file to which one line is appended.

    Raises HeadwaterError naming the target when it cannot be delivered; a caller that must not fail for that
    says so in its log. ConfigError for a target of another kind.
    """
    body = canonical_json(dict(event))
    check_target(target)
    parts = urllib.parse.urlsplit(target)
    if parts.scheme in ("http", "https"):
        address = target if parts.path.strip("/") else target.rstrip("/") + "/api/v1/lineage"
        request = urllib.request.Request(
            address, data=body, headers={"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise HeadwaterError(f"OpenLineage event not delivered to {address}: {error}") from error
        return
    path = Path(parts.path if parts.scheme == "file" else target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write of a whole line, so that several processes can append to the same file.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, body + b"\n")
        finally:
            os.close(handle)
    except OSError as error:
        raise HeadwaterError(f"OpenLineage event not written to {path}: {error}") from error
