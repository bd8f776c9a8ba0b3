"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An answer that is an error: its status, and what its envelope says.

    `param` names the field of the request that is at fault, `code` is a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, Any]:
        """The body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Disconnected(Exception):
    """The client has gone: there is nobody to answer."""


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """The error for a field that is wrong; the message begins with its name."""
    return ApiError(400, f"{param}: {message}", param, code)


def failed() -> ApiError:
    """The error for everything after the engine has failed; why is in the log, not for strangers."""
    return ApiError(500, "the engine has failed; the server's log says why", code="engine_failed")


def draining() -> ApiError:
    """The error for requests that come, or are not finished, when the server ends."""
    return ApiError(503, "the server is shutting down; ask again later", code="shutting_down")


def not_finite() -> ApiError:
    """The error for a sequence on which the model's output was no number; others go on."""
    return ApiError(500, "the model's output is not finite on this prompt", code="not_finite")
