"""What can be wrong with a request."""

from __future__ import annotations

from infra.errors import HeadwaterError


class RequestError(HeadwaterError, ValueError):
    """A request that this engine cannot serve; the message says why and what would fit."""


class SamplingError(RequestError):
    """Sampling rules outside their range; the message names the field."""
