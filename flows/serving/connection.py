"""uvicorn's HTTP/1.1 protocol with an end to its patience.

uvicorn waits without limit for a client that never finishes its headers, that goes on sending a body which
has been refused, or that does not read its answer. Each holds a file descriptor, and the last one memory.
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from flows.serving.errors import ApiError


class PatientProtocol(H11Protocol):
    """Closes a connection that owes bytes of a request for `read_seconds`, or takes none of its answer for
    `write_seconds`. Set both by making a subclass: see `patient`."""

    read_seconds = 30.0
    write_seconds = 60.0
    _owing: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Paused from the first byte that the kernel does not take, so that a stall is seen whatever its size.
        transport.set_write_buffer_limits(0)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the envelope too, where an answer can still be sent."""
        self._last_words(ApiError(400, f"not HTTP that can be read: {msg}", code="invalid_http"))

    def _watch(self) -> None:
        """Have the clock run while the client owes something: headers, or a body that nobody waits for."""
        owing = self.conn.their_state is h11.IDLE or (
            self.conn.their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
        )
        # Between two requests uvicorn's own, shorter clock is running.
        if not owing or self.timeout_keep_alive_task or self.transport.is_closing():
            self._forget()
        elif self._owing is None:
            self._owing = self.loop.call_later(self.read_seconds, self._too_slow)

    def _forget(self) -> None:
        if self._owing:
            self._owing.cancel()
            self._owing = None

    def _too_slow(self) -> None:
        self._owing = None
        message = f"no whole request in {self.read_seconds:g} s"
        self._last_words(ApiError(408, message, code="request_timeout"))

    def _last_words(self, error: ApiError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.envelope()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            reason = {400: b"Bad Request", 408: b"Request Timeout"}[error.status]
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _wait_for_reader(self, left: int) -> None:
        self._stalled = self.loop.call_later(self.write_seconds, self._check_reader, left)

    def _check_reader(self, left: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now < left:
            self._wait_for_reader(now)
        else:
            # Closing would wait for the reader again.
            self.transport.abort()


def patient(read: float, write: float) -> type[PatientProtocol]:
    """The protocol with these limits in seconds; uvicorn makes its connections from a class alone."""
    return type("Patient", (PatientProtocol,), {"read_seconds": read, "write_seconds": write})
