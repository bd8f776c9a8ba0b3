"""in-toto statements and OpenLineage events."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.artifact import Artifact
from infra.build import build
from infra.config import canonical_json
from infra.errors import ConfigError, HeadwaterError
from infra.provenance import completed, emit, lineage_event, run_id, statement
from infra.store import Store
from tests.infra.toys import TRAIN, TrainConfig


@pytest.fixture
def trained(store: Store, words: Artifact) -> Artifact:
    return build(store, TRAIN, TrainConfig(), {"words": [words]}).artifact


def test_the_statement_covers_every_file_and_everything_upstream(
    store: Store, words: Artifact, trained: Artifact
) -> None:
    found = statement(store, trained)
    canonical_json(found)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {one["name"]: one["digest"]["sha256"] for one in found["subject"]} == {
        entry.path: entry.sha256 for entry in trained.record.files
    }
    definition = found["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["config"]["steps"] == 6
    dependencies = {one["uri"]: one["digest"] for one in definition["resolvedDependencies"]}
    assert dependencies[f"urn:headwater:artifact:words:{words.id}"] == {"sha256": words.digest}
    assert (
        dependencies["urn:headwater:source:tests/infra/toys.py"]["sha256"]
        == (trained.record.code["modules"]["tests/infra/toys.py"])
    )
    details = found["predicate"]["runDetails"]
    assert details["metadata"]["startedOn"] == trained.record.started
    assert details["byproducts"][0]["name"] == "logs/stage.log"


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server that takes lineage events; answers 500 below /broken."""
    received: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, json.loads(body)))
            self.send_response(500 if self.path.startswith("/broken") else 201)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", received
        running.shutdown()
        thread.join()


def test_events_by_http(
    trained: Artifact, words: Artifact, server: tuple[str, list[tuple[str, Any]]]
) -> None:
    address, received = server
    event = completed(trained, [words], "demo/train")
    emit(event, address)
    emit(event, f"{address}/own/path")
    assert received == [("/api/v1/lineage", event), ("/own/path", event)]
    assert event["run"]["runId"] == run_id(trained.record) == str(uuid.UUID(event["run"]["runId"]))
    assert [one["name"] for one in event["inputs"]] == [words.ref]
    assert event["outputs"][0]["facets"]["version"]["datasetVersion"] == trained.digest
    assert event["job"] == {"namespace": "headwater", "name": "demo/train", "facets": {}}
    with pytest.raises(HeadwaterError, match=r"not delivered to .*/broken"):
        emit(event, f"{address}/broken")


def test_events_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    run = str(uuid.uuid4())
    first = lineage_event("START", job="demo/train", run=run)
    emit(first, str(path))
    emit(lineage_event("FAIL", job="demo/train", run=run, error="boom"), f"file://{path}")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found[0] == first
    assert found[1]["run"]["facets"]["errorMessage"]["message"] == "boom"
    for event in found:
        for field in ("eventType", "eventTime", "run", "job", "producer", "schemaURL"):
            assert event[field]


def test_what_cannot_be_sent_says_where_to(tmp_path: Path) -> None:
    event = lineage_event("START", job="j", run=str(uuid.uuid4()))
    with pytest.raises(HeadwaterError, match=r"not delivered to http://127\.0\.0\.1:1/api/v1/lineage"):
        emit(event, "http://127.0.0.1:1", timeout=2)
    with pytest.raises(ConfigError, match="use http://"):
        emit(event, "ftp://x/y")
    with pytest.raises(HeadwaterError, match=f"not written to {tmp_path}"):
        emit(event, str(tmp_path))
    with pytest.raises(ConfigError, match="use START"):
        lineage_event("DONE", job="j", run=str(uuid.uuid4()))


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(HeadwaterError, match=r"not delivered to http://127\.0\.0\.1:port"):
        emit({"a": 1}, "http://127.0.0.1:port")
