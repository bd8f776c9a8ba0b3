"""From a request's body to what the engine is asked: prompts as ids, and answers that fit the context."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.serving.conversation import conversation_ids
from flows.serving.errors import ApiError, refused
from flows.serving.protocol import Options, parse_chat, parse_text
from flows.serving.replies import Envelope

if TYPE_CHECKING:
    from data.chat import ChatTokenizer
    from model.engine.request import Request


@dataclass(frozen=True)
class Admitted:
    """A checked call: one request to the engine for each choice of each prompt, prompts in order."""

    options: Options
    requests: tuple[Request, ...]
    prompt_tokens: int
    chat: bool

    def envelope(self, model: str) -> Envelope:
        """What is around its answer."""
        if self.chat:
            return Envelope("chatcmpl", "chat.completion", "chat.completion.chunk", model)
        return Envelope("cmpl", "text_completion", "text_completion", model)


class Admission:
    """Checks calls against one model, known by `names`. Changes nothing, so any thread may use it."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        names: Sequence[str],
        vocab_size: int,
        context: int,
        max_tokens: int,
        max_choices: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.table = tokenizer.token_bytes()
        self._longest = max(map(len, self.table))
        self.names = tuple(names)
        self.vocab_size = vocab_size
        self.context = context
        self.max_tokens = max_tokens
        self.max_choices = max_choices

    def known(self, model: str) -> None:
        """ApiError 404 unless the model is the one that is served."""
        if model not in self.names:
            raise ApiError(
                404, f"model: there is no {model!r} here, but {self.names[0]!r}", "model", "model_not_found"
            )

    def spell(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.table[token] if token < len(self.table) else b""

    def chat(self, body: bytes) -> Admitted:
        """A body of `/v1/chat/completions`. ApiError says what is wrong with it."""
        call = parse_chat(body, self.max_choices)
        self.known(call.options.model)
        self._check_bytes("messages", [message.text for message in call.messages])
        prompt = tuple(conversation_ids(self.tokenizer, call.messages))
        return self._admit(call.options, [prompt], "messages", chat=True)

    def text(self, body: bytes) -> Admitted:
        """A body of `/v1/completions`. A text begins a document; token ids are taken as they are."""
        from data.chat import BOS

        call = parse_text(body, self.max_choices, self.vocab_size)
        self.known(call.options.model)
        texts = [prompt for prompt in call.prompts if isinstance(prompt, str)]
        for text in texts:
            self._check_bytes("prompt", [text])
        encoded = iter(self.tokenizer.encode_many(texts))
        prompts = [(BOS, *next(encoded)) if isinstance(prompt, str) else prompt for prompt in call.prompts]
        return self._admit(call.options, prompts, "prompt", chat=False)

    def _admit(
        self, options: Options, prompts: Sequence[tuple[int, ...]], field: str, chat: bool
    ) -> Admitted:
        """A seed that was given goes to the first choice of every prompt, seed + 1 to the second and so on: a
        prompt is answered alike whatever other prompts come with it. Otherwise every choice has its own.
        """
        from model.engine.request import Request
        from model.engine.sampling import Sampling

        requests = []
        for prompt in prompts:
            limit = self._limit(len(prompt), options, field)
            for number in range(options.n):
                seed = secrets.randbits(63) if options.seed is None else _int64(options.seed + number)
                try:
                    sampling = Sampling(
                        max_tokens=limit,
                        temperature=options.temperature,
                        top_p=options.top_p,
                        top_k=options.top_k,
                        min_p=options.min_p,
                        stop=options.stop,
                        seed=seed,
                    )
                except ValueError as error:
                    raise ApiError(400, str(error)) from error
                requests.append(Request(prompt, sampling))
        return Admitted(options, tuple(requests), sum(map(len, prompts)), chat)

    def _check_bytes(self, field: str, texts: Sequence[str]) -> None:
        """Refuse what cannot fit, were it made of the longest tokens alone, before time is spent on it."""
        least = sum(len(text.encode()) for text in texts) // self._longest
        if least >= self.context:
            raise self._too_long(field, f"at least {least}")

    def _too_long(self, field: str, tokens: str) -> ApiError:
        return refused(
            field,
            f"{tokens} tokens, and the model's context is {self.context}, of which the answer needs at least "
            "one: shorten it",
            "context_length_exceeded",
        )

    def _limit(self, length: int, options: Options, field: str) -> int:
        """How many tokens the answer to a prompt of `length` may have."""
        room = self.context - length
        if room < 1:
            raise self._too_long(field, str(length))
        if options.max_tokens is None:
            return min(self.max_tokens, room)
        if options.max_tokens > room:
            raise refused(
                options.max_tokens_field,
                f"{options.max_tokens} tokens after a prompt of {length} are {options.max_tokens + length}, "
                f"and the model's context is {self.context}: ask for at most {room}",
                "context_length_exceeded",
            )
        return options.max_tokens


def _int64(value: int) -> int:
    """Counting on past the largest seed begins again at the smallest."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
