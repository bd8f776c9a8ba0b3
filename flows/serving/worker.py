"""The thread that runs the engine, and the way to it and back.

Requests reach the thread through an inbox; what each step made goes back to the event loop in one callback a
step. Every sequence that was submitted ends with exactly one event: an update with a finish, or the error
that ended it. All figures are kept on the event loop's side, so nothing but the inbox is locked.

A client that reads slowly does not slow the engine or other clients: updates wait in its call's queue, which
is bounded because an answer is bounded by its max_tokens, and a client that reads nothing at all is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flows.serving.errors import ApiError, draining, failed, not_finite
from flows.serving.metrics import Metrics

if TYPE_CHECKING:
    from model.engine.engine import Engine
    from model.engine.request import Request, Update

log = logging.getLogger("headwater.serving")


class Call:
    """The sequences of one HTTP request: one a choice. Made on the event loop, which alone reads `events`."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.events: asyncio.Queue[tuple[int, Update | Exception]] = asyncio.Queue()
        self.running = set(range(len(self.requests)))
        self.began = time.monotonic()
        self.first: dict[int, float] = {}
        self.made = [0] * len(self.requests)

    async def next(self) -> tuple[int, Update]:
        """The next update and which choice it is of; raises the error that ended one."""
        index, event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return index, event


# None ends a sequence without a word: its call has asked for that.
_Batch = list[tuple[Call, int, "Update | Exception | None"]]


class Worker:
    """An engine in a thread of its own. `limit` is how many sequences may run and wait at a time.

    All methods are for the event loop's thread, but for those that begin with `_run`.
    """

    def __init__(self, engine: Engine, metrics: Metrics, limit: int) -> None:
        self.engine = engine
        self.metrics = metrics
        self.limit = limit
        self.outstanding = 0
        self.failed = False
        self._calls: set[Call] = set()
        self._typical = 1.0
        self._inbox: list[Callable[[], None]] = []
        self._news = threading.Condition()
        self._ending = False
        # The thread's own: which call a ticket belongs to, and back.
        self._owners: dict[int, tuple[Call, int]] = {}
        self._tickets: dict[tuple[Call, int], int] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin; what the engine makes is delivered to the event loop that this is called on."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._thread.is_alive() and not self.failed

    def submit(self, requests: Sequence[Request]) -> Call:
        """Queue the sequences of a call. ApiError 429 when that many more are too many, 500 when the engine
        has failed."""
        if not self.alive:
            raise failed()
        if self.outstanding + len(requests) > self.limit:
            wait = str(max(1, min(60, round(self._typical))))
            raise ApiError(
                429,
                f"{self.outstanding} answers are running or waiting and this server takes {self.limit}: "
                f"ask again in {wait} s",
                code="queue_full",
                headers={"retry-after": wait},
            )
        call = Call(requests)
        self._calls.add(call)
        self.outstanding += len(call.requests)
        self._send(lambda: self._run_submit(call))
        return call

    def cancel(self, call: Call, index: int | None = None) -> None:
        """Stop one sequence of a call, or all, without another event; what has ended is left alone."""
        going = call.running if index is None else call.running & {index}
        for one in sorted(going):
            self._send(lambda one=one: self._run_cancel(call, one, None))

    def cancel_all(self) -> None:
        """Stop everything; whoever still waits is told that the server is shutting down."""
        for call in self._calls:
            for one in sorted(call.running):
                self._send(lambda call=call, one=one: self._run_cancel(call, one, draining()))

    def exposition(self) -> str:
        """The metrics, with what the engine counts now."""
        engine, figures = self.engine, self.engine.figures
        gauges = {
            "running": engine.rows,
            "waiting": max(0, self.outstanding - engine.rows),
            "pages_used": engine.pages.used,
            "pages": engine.pages.limit,
        }
        names = ("reused_tokens", "drafted_tokens", "accepted_tokens", "steps", "preemptions")
        return self.metrics.text(gauges, {name: getattr(figures, name) for name in names})

    async def stop(self) -> None:
        """End the thread after its current step."""
        with self._news:
            self._ending = True
            self._news.notify()
        await asyncio.to_thread(self._thread.join)

    def _send(self, command: Callable[[], None]) -> None:
        with self._news:
            self._inbox.append(command)
            self._news.notify()

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._run_inbox():
                if self.engine.busy:
                    self._run_deliver(self.engine.step())
        except Exception:
            log.exception("the engine has failed; every request is refused until the server is restarted")
            self._run_tell(self._loop_failed)

    def _run_inbox(self) -> bool:
        """Do what the inbox says, waiting for something to do; False when the thread is to end."""
        with self._news:
            while not (self._inbox or self._ending or self.engine.busy):
                self._news.wait()
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        return not self._ending

    def _run_submit(self, call: Call) -> None:
        refused: _Batch = []
        for index, request in enumerate(call.requests):
            try:
                ticket = self.engine.submit(request)
            except ValueError as error:
                refused.append((call, index, ApiError(400, str(error))))
                continue
            self._owners[ticket] = (call, index)
            self._tickets[call, index] = ticket
        if refused:
            self._run_tell(lambda: self._loop_deliver(refused))

    def _run_cancel(self, call: Call, index: int, why: Exception | None) -> None:
        ticket = self._tickets.pop((call, index), None)
        if ticket is not None:
            del self._owners[ticket]
            self.engine.cancel(ticket)
            self._run_tell(lambda: self._loop_deliver([(call, index, why)]))

    def _run_deliver(self, updates: Sequence[Update]) -> None:
        batch: _Batch = []
        for update in updates:
            # Of a cancelled sequence the engine may still say that it ended.
            if owner := self._owners.get(update.ticket):
                batch.append((*owner, update if update.finish != "failed" else not_finite()))
                if update.finish is not None:
                    del self._owners[update.ticket], self._tickets[owner]
        if batch:
            self._run_tell(lambda: self._loop_deliver(batch))

    def _run_tell(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        # The loop may have been closed under a thread that is still in its last step.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    # On the event loop again

    def _loop_deliver(self, batch: _Batch) -> None:
        now = time.monotonic()
        for call, index, event in batch:
            if index not in call.running:
                continue
            if event is None or isinstance(event, Exception):
                self._loop_end(call, index)
            else:
                self._loop_measure(call, index, event, now)
            if event is not None:
                call.events.put_nowait((index, event))

    def _loop_measure(self, call: Call, index: int, update: Update, now: float) -> None:
        if update.tokens:
            if index not in call.first:
                call.first[index] = now
                self.metrics.first_token.observe(now - call.began)
            call.made[index] += len(update.tokens)
            self.metrics.completion_tokens += len(update.tokens)
        if update.finish is not None:
            self._typical += 0.1 * (now - call.began - self._typical)
            spent = now - call.first.get(index, now)
            if call.made[index] > 1 and spent > 0:
                self.metrics.speed.observe((call.made[index] - 1) / spent)
            self._loop_end(call, index)

    def _loop_end(self, call: Call, index: int) -> None:
        call.running.discard(index)
        self.outstanding -= 1
        if not call.running:
            self._calls.discard(call)

    def _loop_failed(self) -> None:
        """Nobody may wait for a thread that is gone."""
        self.failed = True
        for call in list(self._calls):
            self._loop_deliver([(call, index, failed()) for index in sorted(call.running)])
