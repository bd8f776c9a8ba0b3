"""Reading a request's body: no longer than it may be, and no longer than it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flows.serving.errors import ApiError, Disconnected

if TYPE_CHECKING:
    from starlette.types import Receive


async def read_body(headers: Mapping[str, str], receive: Receive, limit: int, seconds: float) -> bytes:
    """The whole body. ApiError 413 as soon as it is known to be longer than `limit` bytes, whether or not its
    length was told before; 408 when it is not there after `seconds`."""
    told = headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body was not here after {seconds:g} s; {size} bytes of it were",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than the {limit} bytes that are read", code="body_too_large")
