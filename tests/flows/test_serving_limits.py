"""Clients that send too much, too slowly or too many at a time, go away or do not read; and the end."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from data.chat import ChatTokenizer
from flows.serving.settings import Settings
from tests.flows.served import MODEL, Served, events, serving, until
from tests.post_training.small import write_tokenizer

LONG = 4000
CONTEXT = LONG + 96
PATH = "/v1/chat/completions"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def served(tokenizer: ChatTokenizer) -> Iterator[Served]:
    """Two rows and a queue of two; answers that go on until their client has enough."""
    settings = Settings(2, 2, LONG, max_body=20_000, read_timeout=0.5, write_timeout=0.5, drain=1.0)
    with serving(tokenizer, settings, context=CONTEXT, endless=True, send_buffer=4096) as running:
        yield running


def body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "Reverse 12."}]
    return json.dumps({"model": MODEL, "messages": messages, **fields}).encode()


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: here", *lines, "", ""]).encode()


def post(content: bytes) -> bytes:
    return head(f"Content-Length: {len(content)}") + content


def answer(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and error of a response, read to its end."""
    start, rest = whole(client)
    return int(start.split()[1]), json.loads(rest)["error"]


def whole(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of a response whose length is told."""
    said = b""
    while True:
        start, ended, rest = said.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", start)
        if ended and length and len(rest) == int(length[1]):
            return start, rest
        part = client.recv(65536)
        assert part, said
        said += part


def idle(served: Served) -> bool:
    return not (served.metric("running") or served.metric("waiting") or served.metric("pages_used"))


@contextlib.contextmanager
def streaming(served: Served, **fields: Any) -> Iterator[httpx.Response]:
    """A stream of which nothing has been read but its beginning."""
    messages = [{"role": "user", "content": "Reverse 12."}]
    asked = {"model": MODEL, "messages": messages, "stream": True, **fields}
    with httpx.stream("POST", served.url + PATH, json=asked, timeout=30) as reply:
        yield reply


def test_a_body_that_is_too_long_is_refused_before_it_is_read(served: Served) -> None:
    with served.connect() as client:
        client.sendall(head("Content-Length: 20001"))
        status, error = answer(client)
        assert (status, error["code"]) == (413, "body_too_large")
        assert "20000 bytes" in error["message"]


def test_a_body_of_untold_length_is_refused_where_it_gets_too_long(served: Served) -> None:
    with served.connect() as client:
        client.sendall(head("Transfer-Encoding: chunked"))
        chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
        client.sendall(chunk * 2)
        client.sendall(chunk * 4)
        status, error = answer(client)
        assert (status, error["code"]) == (413, "body_too_large")
        # What comes after the answer is not kept, and not waited for without end.
        with contextlib.suppress(ConnectionError):
            while True:
                client.sendall(chunk)
                time.sleep(0.01)


def test_a_client_that_sends_all_of_a_body_that_is_too_long_still_reads_why(served: Served) -> None:
    reply = httpx.post(served.url + PATH, content=b" " * 3_000_000)
    assert reply.status_code == 413
    reply = httpx.post(served.url + PATH, content=iter([b" " * 1000] * 3000))
    assert reply.status_code == 413


def test_a_body_that_comes_too_slowly_is_given_up(served: Served) -> None:
    with served.connect() as client:
        client.sendall(head("Content-Length: 1000"))
        done = threading.Event()

        def drip() -> None:
            # Every byte is in time, the whole is not.
            with contextlib.suppress(OSError):
                while not done.wait(0.1):
                    client.sendall(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        status, error = answer(client)
        done.set()
        dripping.join()
        assert (status, error["code"]) == (408, "request_timeout")
        # Closed: what is sent to a closed connection is answered with a reset.
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(10) == b""


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: h", b"GET /health HTTP/1.1\r\n"]
)
def test_headers_that_do_not_come_stop_nobody_else(served: Served, sent: bytes) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.connect()) for _ in range(50)]
        for client in clients:
            client.sendall(sent)
        assert served.chat(max_tokens=2).status_code == 200
        for client in clients:
            status, error = answer(client)
            assert (status, error["code"]) == (408, "request_timeout")


def test_a_second_request_on_a_connection_has_its_time_too(served: Served) -> None:
    with served.connect() as client:
        for _ in range(2):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
            assert whole(client)[1] == b'{"status":"ok"}'
        client.sendall(b"GET /health")
        assert answer(client)[0] == 408


def test_what_is_not_http_gets_an_error_all_the_same(served: Served) -> None:
    with served.connect() as client:
        client.sendall(b"hello\r\n\r\n")
        assert answer(client)[1]["code"] == "invalid_http"
    with served.connect() as client:
        client.sendall(head("Transfer-Encoding: chunked") + b"zzz\r\n")
        assert answer(client)[1]["code"] == "invalid_http"
    assert served.chat(max_tokens=2).status_code == 200


def test_a_full_queue_says_when_to_come_again(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(served.connect()).sendall(post(body()))
        until(lambda: served.metric("running") == served.metric("waiting") == 2)
        reply = served.chat()
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert "this server takes 4" in error["message"]
    until(lambda: idle(served))
    assert served.chat(n=4, max_tokens=2).status_code == 200
    assert served.chat(n=5, max_tokens=2).json()["error"]["param"] == "n"
    assert served.metric('requests_total{endpoint="chat",outcome="queue_full"}') == 1


def test_a_client_that_goes_away_frees_its_rows(served: Served) -> None:
    made = served.metric("completion_tokens_total")
    cancelled = 'requests_total{endpoint="chat",outcome="cancelled"}'
    before = served.metric(cancelled)
    with streaming(served, n=2):
        assert served.metric("running") == 2
    until(lambda: idle(served))
    with served.connect() as client:
        client.sendall(post(body(n=3)))
        until(lambda: served.metric("running") == 2 and served.metric("waiting") == 1)
    until(lambda: idle(served))
    until(lambda: served.metric(cancelled) == before + 2)
    assert served.metric("completion_tokens_total") - made < 3 * LONG


def test_a_client_that_does_not_read_is_cut_off_and_holds_nobody_up(served: Served) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", served.port))
        client.sendall(post(body(stream=True, logprobs=True)))
        until(lambda: served.metric("running") == 1)
        assert served.chat(max_tokens=5).status_code == 200
        until(lambda: idle(served))
        client.settimeout(10)
        said = b""
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                said += part
        assert b"data: " in said
        assert b"[DONE]" not in said


def test_draining_refuses_what_is_new_and_ends_what_runs(tokenizer: ChatTokenizer) -> None:
    settings = Settings(4, 4, LONG, drain=20.0)
    with serving(tokenizer, settings, context=CONTEXT, endless=True, send_buffer=4096) as served:
        # More than the buffers between the two hold: the answer is not over before it is read.
        with streaming(served, max_tokens=1000) as reply:
            lines = reply.iter_lines()
            next(lines)
            served.end()
            until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
            assert httpx.get(f"{served.url}/health").json() == {"status": "draining"}
            refused = served.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            rest = list(lines)
        assert [line for line in rest if line][-1] == "data: [DONE]"
        served.thread.join(20)
        assert not served.thread.is_alive()


@pytest.mark.parametrize(("drain", "asked"), [(0.2, 1), (60.0, 2)])
def test_what_is_not_finished_when_the_drain_ends_is_told_so(
    tokenizer: ChatTokenizer, drain: float, asked: int
) -> None:
    settings = Settings(4, 4, LONG, drain=drain)
    with serving(tokenizer, settings, context=CONTEXT, endless=True) as served:
        with served.connect() as client, streaming(served) as reply:
            client.sendall(post(body()))
            until(lambda: served.metric("running") == 2)
            # Asked twice, it does not wait for the drain.
            for _ in range(asked):
                served.end()
            last = events(reply.read().decode())[-1]
            assert last["error"]["code"] == "shutting_down"
            assert answer(client)[0] == 503
        served.thread.join(20)
        assert not served.thread.is_alive()


def test_a_prompt_that_breaks_the_model_s_arithmetic_is_an_error_of_its_own(tokenizer: ChatTokenizer) -> None:
    with serving(tokenizer, Settings(4, 4, 8)) as served:
        expected = served.chat("Reverse 12.", seed=1).json()["choices"]
        [broken] = tokenizer.encode("~")
        with torch.no_grad():
            served.engine.model.embed_tokens[broken] = float("nan")
        reply = served.chat("Reverse ~.", seed=1)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "not_finite")
        assert served.chat("Reverse 12.", seed=1).json()["choices"] == expected
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_an_engine_that_fails_leaves_nobody_waiting(
    tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tokenizer, Settings(1, 4, LONG), context=CONTEXT, endless=True) as served:
        with served.connect() as client, streaming(served) as reply:
            client.sendall(post(body()))
            until(lambda: served.metric("waiting") == 1)
            # A cache that has lost its storage: the next step raises.
            served.engine.pages.latents = [one[:1] for one in served.engine.pages.latents]
            last = events(reply.read().decode())[-1]
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "engine_failed")
            assert answer(client)[0] == 500
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert httpx.get(f"{served.url}/health").json() == {"status": "failed"}
        reply = served.chat()
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_failed")
        assert served.metric('requests_total{endpoint="chat",outcome="failed"}') == 3
    assert "the engine has failed" in caplog.text
