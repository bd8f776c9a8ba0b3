"""The server from its first byte to its last: binding, serving, draining."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from flows.serving.admission import Admission
from flows.serving.app import State, make_app
from flows.serving.connection import patient
from flows.serving.metrics import Metrics
from flows.serving.settings import Settings
from flows.serving.worker import Worker
from infra.errors import HeadwaterError

if TYPE_CHECKING:
    from data.chat import ChatTokenizer
    from model.engine.engine import Engine

# For the last words of cancelled answers to reach their readers.
_GRACE = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet: who connects before the model is there is refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise HeadwaterError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise HeadwaterError(
            f"cannot serve at {host} port {port}: {error.strerror}; choose another --port (0: any free one)"
        ) from None
    return bound


def more_files() -> None:
    """Let this process have as many connections as the system allows: by default it is often 1,024 files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Server:
    """Serves one engine until `end` is called or, with `signals`, SIGINT or SIGTERM come."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        model: str,
        settings: Settings | None = None,
        aliases: tuple[str, ...] = (),
    ) -> None:
        self.settings = settings or Settings()
        s = self.settings
        worker = Worker(engine, Metrics(), s.max_rows + s.max_queue)
        # More choices than may ever wait would be told to ask again for ever.
        choices = min(s.max_choices, worker.limit)
        vocab_size = engine.model.config.vocab_size
        names = (model, *aliases)
        admission = Admission(tokenizer, names, vocab_size, engine.context, s.max_tokens, choices)
        self.state = State(admission, worker, s, model)
        self._end = asyncio.Event()
        self._now = asyncio.Event()

    def end(self) -> None:
        """Drain and stop; called again, stop without waiting. On the event loop's thread."""
        (self._now if self._end.is_set() else self._end).set()

    async def run(self, bound: socket.socket, ready: Callable[[], None], signals: bool = False) -> None:
        """Serve at a bound socket; `ready` is called when connections are taken."""
        config = uvicorn.Config(
            make_app(self.state),
            http=patient(self.settings.read_timeout, self.settings.write_timeout),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        inner = _Inner(config)
        self.state.worker.start()
        loop = asyncio.get_running_loop()
        for one in (signal.SIGINT, signal.SIGTERM) if signals else ():
            loop.add_signal_handler(one, self.end)
        serving = asyncio.create_task(inner.serve(sockets=[bound]))
        try:
            while not inner.started and not serving.done():
                await asyncio.sleep(0.01)
            if not serving.done():
                ready()
                ended = asyncio.create_task(self._end.wait())
                await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
                await self._drain(inner)
        finally:
            inner.should_exit = True
            await serving
            await self.state.worker.stop()

    async def _drain(self, inner: uvicorn.Server) -> None:
        """Refuse what is new, wait for what runs, tell the rest that it is over."""
        self.state.draining = True
        await self._quiet(self.settings.drain, self._now)
        self.state.worker.cancel_all()
        await self._quiet(_GRACE, None)
        # Whoever has not taken its answer by now does not read.
        for connection in list(inner.server_state.connections):
            if self.state.responding and connection.transport is not None:
                connection.transport.abort()

    async def _quiet(self, seconds: float, sooner: asyncio.Event | None) -> None:
        """Until nothing is being answered, but no longer than `seconds`."""
        end = asyncio.get_running_loop().time() + seconds
        while self.state.responding and asyncio.get_running_loop().time() < end:
            if sooner is not None and sooner.is_set():
                return
            await asyncio.sleep(0.02)


class _Inner(uvicorn.Server):
    """uvicorn without its signal handlers, which would end it before it is drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
