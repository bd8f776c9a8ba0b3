"""The real server over a real small model, on a loopback socket in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from data.chat import END_THINK, EOS, THINK, ChatTokenizer
from flows.serving.server import Server, bind
from flows.serving.settings import Settings
from model.engine.engine import Engine
from model.transformer import Transformer
from tests.post_training.small import small_model

MODEL = "small"


@dataclass
class Served:
    """A running server."""

    server: Server
    port: int
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self) -> Engine:
        return self.server.state.worker.engine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        """Ask it to drain, as a signal does."""
        self.loop.call_soon_threadsafe(self.server.end)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        """One request on a connection of its own."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more)

    def chat(self, text: str = "Reverse 12.", **fields: Any) -> httpx.Response:
        """One question."""
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})

    def metric(self, name: str) -> float:
        """A sample of `/metrics`, labels and all, by what stands before its value."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"headwater_{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def connect(self) -> socket.socket:
        """A bare connection, for clients that misbehave."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


def model(tokenizer: ChatTokenizer, context: int = 512) -> Transformer:
    """Random weights, but every second answer to "Reverse 12." begins with a thought, and thoughts end."""
    made = small_model(original_max_position_embeddings=context)
    prompt = torch.tensor([tokenizer.prompt_ids("Reverse 12.")])
    anything = torch.randint(10, 300, (8, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for token, read, logit in ((THINK, prompt, 6.0), (END_THINK, anything, 3.0)):
            state = made(read).states_BTD[0][:, -1].mean(0)
            made.lm_head[token] = logit * state / state.square().sum()
    return made


@contextlib.contextmanager
def serving(
    tokenizer: ChatTokenizer,
    settings: Settings | None = None,
    context: int = 512,
    endless: bool = False,
    send_buffer: int = 0,
    **engine: Any,
) -> Iterator[Served]:
    """A server until the end of the block. `endless`: its answers end at their limit alone."""
    settings = settings or Settings(max_rows=8, drain=5.0)
    made = Engine(
        model(tokenizer, context),
        [] if endless else [EOS],
        max_rows=settings.max_rows,
        token_bytes=tokenizer.token_bytes(),
        **engine,
    )
    bound = bind("127.0.0.1", 0)
    if send_buffer:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Server(made, tokenizer, MODEL, settings)
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.run(bound, ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="server")
    thread.start()
    assert ready.wait(20)
    served = Served(server, bound.getsockname()[1], thread, loops[0])
    try:
        yield served
    finally:
        if thread.is_alive():
            served.end()
            thread.join(30)
        bound.close()
        assert not thread.is_alive()


def events(text: str) -> list[Any]:
    """What a stream of server-sent events says; the last is "[DONE]" where it ended well."""
    assert text.endswith("\n\n")
    found = []
    for event in text[:-2].split("\n\n"):
        assert event.startswith("data: ")
        assert "\n" not in event
        data = event.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
