"""The fingerprint: what a result depends on, in one hash. Equal fingerprint, equal deterministic payload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infra.config import canonical_json
from infra.files import sha256_bytes

ID_LENGTH = 12


def fingerprint(
    stage: str,
    version: int,
    identity: Mapping[str, Any],
    inputs: Mapping[str, Sequence[str]],
    sources: str = "",
) -> str:
    """SHA-256 (64 hex digits) over a stage, its identity config and its inputs' payload digests.

    `inputs` maps role to digests; their order within a role counts, roles without any do not. `sources` is
    the digest of scanned external inputs. Raises ConfigError naming a config field that has no deterministic
    JSON form.
    """
    return sha256_bytes(
        canonical_json(
            {
                "stage": stage,
                "version": version,
                "config": dict(identity),
                "inputs": {role: list(digests) for role, digests in inputs.items() if digests},
                "sources": sources,
            }
        )
    )


def artifact_id(fingerprint: str, attempt: int = 1) -> str:
    """The folder name of an artifact: 12 hex digits of the fingerprint, and `-2` for a second forced
    attempt.
    """
    return fingerprint[:ID_LENGTH] + (f"-{attempt}" if attempt > 1 else "")
