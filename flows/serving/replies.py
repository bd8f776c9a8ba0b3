"""The shapes of OpenAI's responses: whole ones and the chunks of streamed ones."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flows.serving.detokenize import Answer, Piece, Scored


@dataclass
class Choice:
    """One answer of a call: how it is made, and, where nothing is streamed, what was made of it so far."""

    answer: Answer
    thought: str = ""
    text: str = ""
    scored: dict[bool, list[Scored]] = field(default_factory=lambda: {True: [], False: []})

    def add(self, pieces: Sequence[Piece]) -> None:
        """Keep what is to be sent when all is there."""
        for piece in pieces:
            if piece.thought:
                self.thought += piece.text
            else:
                self.text += piece.text
            self.scored[piece.thought] += piece.scored


class Shape(Protocol):
    """How an endpoint says things. `thoughts` is whether it parts a thought from the answer."""

    thoughts: bool

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if it has one before there is any text."""
        ...

    def part(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a piece of text, None when it would say nothing."""
        ...

    def ending(self, index: int, finish: str) -> dict[str, Any]:
        """The last chunk of a choice."""
        ...


class Envelope:
    """What is around the choices of one call: id, time, model, usage."""

    def __init__(self, prefix: str, kind: str, chunk: str, model: str) -> None:
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._kind, self._chunk = kind, chunk

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, told: bool
    ) -> dict[str, Any]:
        """A chunk of one that is; `told`: the client wants usage, null in all chunks but the last."""
        more = {"usage": usage} if told else {}
        return {**self._head, "object": self._chunk, "choices": choices, **more}


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens read and made. A prompt with several choices counts once; end-of-sequence tokens count."""
    made = sum(choice.answer.made for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.answer.thought_tokens for choice in choices)
        },
    }


class ChatShape:
    """`chat.completion`: a thought goes into `reasoning_content`, as DeepSeek's own API has it."""

    thoughts = True

    def __init__(self, spell: Callable[[int], bytes], log_probs: bool) -> None:
        self._spell = spell
        self._log_probs = log_probs

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        message = {"role": "assistant", "content": choice.text, "reasoning_content": choice.thought or None}
        scores = None
        if self._log_probs:
            scores = {"content": self._scores(choice.scored[False])}
            if choice.scored[True]:
                scores["reasoning_content"] = self._scores(choice.scored[True])
        finish = choice.answer.finish
        return {"index": index, "message": message, "logprobs": scores, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def part(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """A piece of the thought or of the answer."""
        if not (piece.text or self._log_probs):
            return None
        name = "reasoning_content" if piece.thought else "content"
        scores = {name: self._scores(piece.scored)} if self._log_probs else None
        return self._chunk(index, {name: piece.text}, scores)

    def ending(self, index: int, finish: str) -> dict[str, Any]:
        """Why it ended."""
        return self._chunk(index, {}, finish=finish)

    @staticmethod
    def _chunk(
        index: int, delta: dict[str, Any], scores: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}

    def _scores(self, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        found = []
        for one in scored:
            raw = self._spell(one.token)
            token = raw.decode("utf-8", "replace")
            found.append({"token": token, "logprob": one.log_prob, "bytes": list(raw), "top_logprobs": []})
        return found


class TextShape:
    """`text_completion`: all text is one, and control tokens, thought tags among them, are left out of it."""

    thoughts = False

    def __init__(self, spell: Callable[[int], bytes], log_probs: bool) -> None:
        self._spell = spell
        self._log_probs = log_probs

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        return self._choice(index, choice.text, choice.scored[False], choice.answer.finish)

    def opening(self, index: int) -> None:
        """None: text begins with text."""

    def part(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """A piece of the text."""
        if not (piece.text or self._log_probs):
            return None
        return self._choice(index, piece.text, piece.scored, None)

    def ending(self, index: int, finish: str) -> dict[str, Any]:
        """Why it ended."""
        return self._choice(index, "", [], finish)

    def _choice(self, index: int, text: str, scored: Sequence[Scored], finish: str | None) -> dict[str, Any]:
        scores = None
        if self._log_probs:
            scores = {
                "tokens": [self._spell(one.token).decode("utf-8", "replace") for one in scored],
                "token_logprobs": [one.log_prob for one in scored],
                "top_logprobs": None,
                "text_offset": [one.offset for one in scored],
            }
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": finish}
