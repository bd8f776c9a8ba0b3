"""From the engine's tokens to text that may be shown, as they come.

Three things make this more than a look-up. A character may be cut between two tokens: its bytes wait until it
is whole. What may be the beginning of a stop string waits until it is known not to be, so that no part of a
stop string is ever sent. And a response that begins with <think> is two texts, its thought and its answer.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.engine.request import Update

_decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class Scored:
    """A token of a piece: its id, its log-probability, and where in its text it begins."""

    token: int
    log_prob: float
    offset: int


@dataclass
class Piece:
    """Text to show now, of the thought or of the answer, and the tokens that were completed with it."""

    thought: bool
    text: str = ""
    scored: list[Scored] = field(default_factory=list)


@dataclass
class _Held:
    """A token of which some bytes are not shown yet. `offset` is set when the first of them is."""

    token: int
    log_prob: float
    thought: bool
    rest: bytes
    scored: bool
    offset: int = -1


class TextStream:
    """Tokens in, pieces out. `table` has the bytes of each id, none for a control token.

    The result depends on the tokens alone, not on how many come at a time. A control token has no text and no
    place among the scored; with `thoughts`, a first <think> and the </think> after it part the two texts.
    Stop strings are looked for in the bytes of the whole response, as the engine does.
    """

    def __init__(self, table: Sequence[bytes], stop: Iterable[str] = (), thoughts: bool = True) -> None:
        from data.chat import END_THINK, THINK

        self._table = table
        self._stops = [text.encode() for text in stop]
        self._open, self._close = (THINK, END_THINK) if thoughts else (-1, -1)
        self._bytes = bytearray()
        self._held: deque[_Held] = deque()
        self.thinking = False
        """Whether a thought is begun and not ended."""
        self._decoders = {True: _decoder("replace"), False: _decoder("replace")}
        self._length = {True: 0, False: 0}
        self.seen = 0
        self.thought_tokens = 0
        self.stopped = False
        """Whether a stop string was found: what comes after it is not shown."""

    def feed(self, tokens: Sequence[int], log_probs: Sequence[float]) -> list[Piece]:
        """What the tokens allow to be shown."""
        pieces: list[Piece] = []
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if not self.stopped:
                self._take(token, log_prob, pieces)
        return [piece for piece in pieces if piece.text or piece.scored]

    def close(self) -> list[Piece]:
        """What is left at the end; half a character is shown as U+FFFD."""
        pieces: list[Piece] = []
        self._show(len(self._bytes), pieces)
        for thought in (True, False):
            self._end_text(thought, pieces)
        return [piece for piece in pieces if piece.text or piece.scored]

    def _take(self, token: int, log_prob: float, pieces: list[Piece]) -> None:
        first, self.seen = self.seen == 0, self.seen + 1
        if first and token == self._open:
            self.thinking = True
        self.thought_tokens += self.thinking
        # A vocabulary may be padded beyond the ids that the tokenizer knows.
        spelled = self._table[token] if token < len(self._table) else b""
        self._held.append(_Held(token, log_prob, self.thinking, spelled, bool(spelled)))
        if self.thinking and token == self._close:
            self.thinking = False
        self._bytes += spelled
        found = [at for stop in self._stops if (at := self._bytes.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._cut(min(found))
            self._show(len(self._bytes), pieces)
        else:
            self._show(len(self._bytes) - self._doubtful(), pieces)

    def _doubtful(self) -> int:
        """How many of the last bytes may be the beginning of a stop string."""
        most = 0
        for stop in self._stops:
            for size in range(min(len(self._bytes), len(stop) - 1), most, -1):
                if self._bytes.endswith(stop[:size]):
                    most = size
                    break
        return most

    def _cut(self, at: int) -> None:
        """Forget the bytes from `at` on, and the tokens that begin there or later."""
        del self._bytes[at:]
        kept: deque[_Held] = deque()
        for one in self._held:
            # A token some bytes of which are shown already is kept for its score.
            if at <= 0 and one.offset < 0:
                break
            one.rest = one.rest[:at]
            at -= len(one.rest)
            kept.append(one)
        self._held = kept

    def _show(self, count: int, pieces: list[Piece]) -> None:
        """Decode the first `count` held bytes, and the tokens without bytes that come right after."""
        del self._bytes[:count]
        while self._held and (count or not self._held[0].rest):
            one = self._held[0]
            piece = self._piece(one.thought, pieces)
            if one.offset < 0:
                one.offset = self._length[one.thought]
            part, one.rest = one.rest[:count], one.rest[count:]
            count -= len(part)
            self._add(piece, self._decoders[one.thought].decode(part))
            if one.rest:
                return
            self._held.popleft()
            if one.scored:
                piece.scored.append(Scored(one.token, one.log_prob, one.offset))
            if one.thought and one.token == self._close:
                self._end_text(True, pieces)

    def _piece(self, thought: bool, pieces: list[Piece]) -> Piece:
        if not pieces or pieces[-1].thought != thought:
            pieces.append(Piece(thought))
        return pieces[-1]

    def _add(self, piece: Piece, text: str) -> None:
        piece.text += text
        self._length[piece.thought] += len(text)

    def _end_text(self, thought: bool, pieces: list[Piece]) -> None:
        """The bytes of a character that will not be completed any more."""
        self._add(self._piece(thought, pieces), self._decoders[thought].decode(b"", final=True))


class Answer:
    """One response in the making: the engine's updates in, pieces of text out."""

    def __init__(self, table: Sequence[bytes], stop: Iterable[str] = (), thoughts: bool = True) -> None:
        self._stream = TextStream(table, stop, thoughts)
        self.made = 0
        """Tokens made so far, the end-of-sequence token and those of a stop string included."""
        self.finish: str | None = None

    @property
    def thinking(self) -> bool:
        """Whether a thought is begun and not ended."""
        return self._stream.thinking

    @property
    def thought_tokens(self) -> int:
        """Tokens of the thought, its tags included."""
        return self._stream.thought_tokens

    def take(self, update: Update) -> list[Piece]:
        """What one update of the engine allows to be shown; `finish` is set by the last."""
        if self.finish is not None:
            return []
        self.made += len(update.tokens)
        pieces = self._stream.feed(update.tokens, update.log_probs)
        self.finish = "stop" if self._stream.stopped else update.finish
        return pieces if self.finish is None else [*pieces, *self._stream.close()]
