"""A conversation in the terminal: answers appear as they are made, and earlier turns are remembered."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from flows.serving.conversation import Message, fit
from flows.serving.detokenize import Answer, Piece

if TYPE_CHECKING:
    from data.chat import ChatTokenizer
    from model.engine.engine import Engine
    from model.engine.sampling import Sampling

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# What a model says must not move the cursor, ring the bell or rename the window.
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Talk:
    """Asks an idle engine one question at a time. Each draws from a seed of its own, so asking again gives
    another sample. Answers go to `out`, with dimmed thoughts where that is a terminal, remarks to `notes`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        sampling: Sampling,
        system: str = "",
        out: TextIO | None = None,
        notes: TextIO | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.system = system
        self.turns: list[Message] = []
        self._table = tokenizer.token_bytes()
        self._out = out or sys.stdout
        self._notes = notes or sys.stderr

    def run(self) -> None:
        """Questions from the standard input until an empty line, its end or /exit."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (gives input() its editing keys and history)
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise
                self._note("\nan empty line, Ctrl-D or /exit ends the chat")
                continue
            # Bytes of the terminal that are no UTF-8 come as halves of surrogate pairs.
            line = line.encode("utf-8", "replace").decode()
            if not line.strip() or line.strip() == "/exit":
                return
            if found := _COMMAND.fullmatch(line.rstrip()):
                self._command(found[1], found[2] or "")
            else:
                self.ask(line.strip())

    def ask(self, prompt: str) -> None:
        """Answer one question, and remember both; Ctrl-C stops the answer, a second one the program."""
        from model.engine.request import Request

        context, limit = self.engine.context, self.sampling.max_tokens
        system = [Message("system", self.system)] if self.system else []
        asked = [*system, *self.turns, Message("user", prompt)]
        ids, kept, lost = fit(self.tokenizer, asked, context - min(limit, context // 2))
        if lost:
            self._note(f"the conversation no longer fits the context of {context} tokens: {_forgotten(lost)}")
        self.turns = kept[len(system) : -1]
        if len(ids) >= context:
            self._note(f"this takes {len(ids)} tokens and the model's context is {context}: ask less")
            return
        sampling = replace(self.sampling, max_tokens=min(limit, context - len(ids)))
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        with _interrupts() as came:
            ticket = self.engine.submit(Request(tuple(ids), sampling))
            try:
                text = self._tell(Answer(self._table), came)
            finally:
                self.engine.cancel(ticket)
        if text:
            self.turns = [*kept[len(system) :], Message("assistant", text)]
        else:
            self._note("there was no answer, so this question is forgotten")

    def _tell(self, answer: Answer, came: list[int]) -> str:
        """Step until the answer ends or `came` is not empty; returns the answer without its thought."""
        screen = _Screen(self._out)
        text = ""
        while answer.finish is None and not came:
            for update in self.engine.step():
                pieces = answer.take(update)
                screen.show(pieces, answer.thinking)
                text += "".join(piece.text for piece in pieces if not piece.thought)
        screen.end()
        if came:
            self._note("stopped")
        elif answer.finish == "failed":
            self._note("the model's output is not finite")
        elif answer.finish == "length":
            self._note(f"cut after {answer.made} tokens")
        return text

    def _command(self, name: str, rest: str) -> None:
        if name == "reset":
            self.turns = []
            self._note("the conversation begins anew")
        elif name == "system":
            self.system = rest
            self._note("the system prompt is set" if rest else "there is no system prompt any more")
        else:
            self._note(f"no command /{name}: there are /reset, /system TEXT and /exit")

    def _note(self, text: str) -> None:
        self._out.flush()
        print(text, file=self._notes, flush=True)


class _Screen:
    """Prints one answer: in a terminal its thought is dim, elsewhere it stands between its tags."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._open, self._close = (_DIM, f"{_PLAIN}\n") if self._terminal else ("<think>", "</think>")
        self._thinking = False

    def show(self, pieces: list[Piece], thinking: bool) -> None:
        """Print pieces; `thinking` is whether the thought goes on after them."""
        for piece in pieces:
            self._turn(piece.thought)
            self._out.write(piece.text.translate(_HARMLESS) if self._terminal else piece.text)
        self._turn(thinking)
        self._out.flush()

    def end(self) -> None:
        """End the line, and the dimming of a thought that was not ended."""
        self._out.write(f"{_PLAIN}\n" if self._terminal and self._thinking else "\n")
        self._out.flush()

    def _turn(self, thinking: bool) -> None:
        if thinking != self._thinking:
            self._out.write(self._open if thinking else self._close)
            self._thinking = thinking


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C, so that it never comes in the middle of a step; the second is raised all the same."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _forgotten(turns: int) -> str:
    return "the oldest turn is forgotten" if turns == 1 else f"the oldest {turns} turns are forgotten"
