"""`serve` and `chat` as a user starts them, on a checkpoint in a store, and the chat's own manners."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from data.chat import EOS, ChatTokenizer
from flows.serving.server import bind
from flows.serving.talk import Talk
from infra.build import build
from infra.config import StageConfig
from infra.errors import HeadwaterError
from infra.stage import Stage, StageContext
from infra.store import Store
from model.checkpoint import save_model
from model.engine.engine import Engine
from model.engine.sampling import Sampling
from tests.flows.conftest import environment
from tests.flows.served import model
from tests.post_training.small import write_tokenizer


class Nothing(StageConfig):
    """No settings."""


def make(config: Nothing, context: StageContext) -> None:
    """A checkpoint with random weights."""
    context.out.mkdir(exist_ok=True)
    save_model(model(write_tokenizer(context.out / "tokenizer.json")), context.out)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one checkpoint, promoted to the name `small`."""
    store = Store(tmp_path_factory.mktemp("home"))
    made = build(store, Stage("random", 1, Nothing, make), Nothing(), {})
    store.promote(made.artifact.ref, "small")
    return store.home


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> ChatTokenizer:
    return ChatTokenizer(Store(home).resolve("small").file("tokenizer.json"))


@contextlib.contextmanager
def command(home: Path, *arguments: str, **how: int) -> Iterator[subprocess.Popen[str]]:
    """A `headwater` command that is running; whatever is left of it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.cli", *arguments],
        env={**environment(home), "OMP_NUM_THREADS": "1"},
        text=True,
        # A shell without job control starts what it puts in the background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_serve_answers_and_a_signal_lets_it_finish(home: Path) -> None:
    with command(home, "serve", "small", "--port", "0", "--max-rows", "4", "--invariant") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving small at http://127.0.0.1:"), line + process.communicate()[1]
        url = line.split()[3].rstrip(",")
        [card] = httpx.get(f"{url}/models").json()["data"]
        assert card["id"] == "small"
        ref = Store(home).resolve("small").ref
        messages = [{"role": "user", "content": "Reverse 12."}]
        asked = {"model": ref, "messages": messages, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{url}/chat/completions", json=asked, timeout=30) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        [last] = json.loads(rest[-2].removeprefix("data: "))["choices"]
        assert last["finish_reason"] in ("stop", "length")
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_serve_says_why_it_cannot(home: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(HeadwaterError, match="choose another --port"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(HeadwaterError, match=r"--host no such host: .*give an address"):
        bind("no such host", 0)


def test_chat_reads_a_pipe_to_its_end(home: Path) -> None:
    arguments = ("chat", "small", "--max-tokens", "8", "--temperature", "0")
    with command(home, *arguments, stdin=subprocess.PIPE) as process:
        out, errors = process.communicate("What is this?\n/reset\nWhat is this?\n\nnever asked\n", timeout=60)
    assert process.returncode == 0
    # The likeliest first token begins a thought, and eight do not end it.
    unfinished = ["cut after 8 tokens", "there was no answer, so this question is forgotten"]
    assert errors.splitlines() == [*unfinished, "the conversation begins anew", *unfinished]
    with command(home, "generate", "small", "What is this?", "--max-tokens", "8") as process:
        once, errors = process.communicate(timeout=60)
    assert errors == ""
    assert len(once) > 8
    # A tag that is out of place is told by `generate` alone.
    text = once.replace("<think>", "")
    assert out.replace("<think>", "") == f"> {text}> > {text}> "


def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_chat(home: Path) -> None:
    terminal, inside = pty.openpty()
    unread = ""

    def read(until: str) -> None:
        nonlocal unread
        end = time.monotonic() + 60
        while until not in unread:
            assert select.select([terminal], [], [], end - time.monotonic())[0], unread
            unread += os.read(terminal, 65536).decode(errors="replace")
        unread = unread.partition(until)[2]

    arguments = ("chat", "small", "--max-tokens", "500", "--temperature", "2")
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    with command(home, *arguments, **streams) as process:
        read("> ")
        os.write(terminal, b"Reverse 12.\n")
        read("Reverse 12.\r\n")
        assert unread or select.select([terminal], [], [], 60)[0]
        process.send_signal(signal.SIGINT)
        read("stopped")
        read("> ")
        # Between its prompt and its waiting, Python's input() misses a signal.
        while not select.select([terminal], [], [], 0.2)[0]:
            process.send_signal(signal.SIGINT)
        read("/exit ends the chat")
        os.write(terminal, b"/exit\n")
        assert process.wait(20) == 0
    os.close(inside)
    os.close(terminal)


class Spoken(io.StringIO):
    """Where an answer goes in a test: a terminal or not, and what happens when something is written."""

    def __init__(self, terminal: bool = False, heard: Callable[[str], None] = lambda text: None) -> None:
        super().__init__()
        self.terminal = terminal
        self.heard = heard

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.heard(text)
        return super().write(text)


@pytest.fixture
def talk(tokenizer: ChatTokenizer) -> Iterator[Callable[..., Talk]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def begin(out: Spoken, notes: io.StringIO, context: int = 512, **sampling: float) -> Talk:
        engine = Engine(model(tokenizer, context), [EOS], max_rows=1)
        return Talk(engine, tokenizer, Sampling(**sampling), out=out, notes=notes)

    yield begin
    torch.set_num_threads(before)


def test_turns_are_remembered_and_the_oldest_forgotten(talk: Callable[..., Talk]) -> None:
    out, notes = Spoken(), io.StringIO()
    one = talk(out, notes, context=128, max_tokens=24, seed=1)
    one.system = "Be brief."
    for number in range(8):
        one.ask(f"Reverse {number}.")
    assert "no longer fits the context of 128 tokens: the oldest turn is forgotten" in notes.getvalue()
    assert 1 <= len(one.turns) // 2 < 8
    assert one.turns[-2].text == "Reverse 7."
    assert [turn.role for turn in one.turns] == ["user", "assistant"] * (len(one.turns) // 2)
    assert out.getvalue().rstrip("\n").endswith(one.turns[-1].text)
    before = list(one.turns)
    one.ask("9" * 300)
    assert "and the model's context is 128: ask less" in notes.getvalue()
    assert one.turns == []
    assert before


def test_the_second_turn_is_answered_knowing_the_first(talk: Callable[..., Talk]) -> None:
    said = []
    for first in ("Reverse 12.", "Reverse 345."):
        out = Spoken()
        one = talk(out, io.StringIO(), max_tokens=16, temperature=0.0)
        one.ask(first)
        one.ask("Again.")
        said.append(out.getvalue())
    assert said[0].splitlines()[-1] != said[1].splitlines()[-1]


def test_a_thought_is_dim_in_a_terminal_and_tagged_elsewhere(talk: Callable[..., Talk]) -> None:
    for seed in range(50):
        plain, terminal = Spoken(), Spoken(terminal=True)
        one = talk(plain, io.StringIO(), max_tokens=60, seed=seed)
        one.ask("Reverse 12.")
        if one.turns and plain.getvalue().startswith("<think>"):
            break
    answer = one.turns[-1].text
    thought = plain.getvalue().removeprefix("<think>").removesuffix(f"</think>{answer}\n")
    assert plain.getvalue() == f"<think>{thought}</think>{answer}\n"
    talk(terminal, io.StringIO(), max_tokens=60, seed=seed).ask("Reverse 12.")
    shown = terminal.getvalue()
    assert shown.startswith("\x1b[2m")
    assert shown.count("\x1b") == 2
    assert "\x1b[0m\n" in shown
    assert all(ord(letter) >= 32 or letter in "\n\t\x1b" for letter in shown)


def test_ctrl_c_keeps_what_was_said_and_the_engine_is_free(talk: Callable[..., Talk]) -> None:
    written: list[str] = []

    def interrupt(text: str) -> None:
        written.append(text)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    notes = io.StringIO()
    one = talk(Spoken(heard=interrupt), notes, max_tokens=400, temperature=2.0)
    one.ask("What is this?")
    assert notes.getvalue() == "stopped\n"
    assert not one.engine.busy
    assert one.engine.figures.made_tokens < 40
    assert len(one.turns) == 2
    assert signal.getsignal(signal.SIGINT) is before
