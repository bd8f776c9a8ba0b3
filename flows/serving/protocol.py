"""What a client may ask, read from JSON and checked before anything is queued.

Fields nobody knows are ignored: clients send many. A field that is known to change what the answer means and
that is not supported is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flows.serving.conversation import Message
from flows.serving.errors import ApiError, refused
from flows.serving.fields import Fields, kind, list_of, parse_object, text_of

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_TEMPERATURE = 2.0
# Below this a division by the temperature overflows; the distribution is one token's long before.
_GREEDY = 1e-5
_WHOLE = (1 << 31) - 1
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Options:
    """What chats and completions have in common. `seed` and `max_tokens` are None where none was given."""

    model: str
    stream: bool
    include_usage: bool
    n: int
    seed: int | None
    max_tokens: int | None
    max_tokens_field: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: tuple[str, ...]
    log_probs: bool


@dataclass(frozen=True)
class ChatCall:
    """A conversation to answer."""

    options: Options
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class TextCall:
    """Texts, or token ids, to continue: `n` choices of each."""

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]


def parse_chat(body: bytes, max_choices: int) -> ChatCall:
    """The body of `POST /v1/chat/completions`; ApiError 400 names the field that is wrong."""
    fields = Fields(parse_object(body))
    fields.text("model")
    _check_unsupported(fields)
    raw = list_of(fields.values.get("messages"), "messages")
    messages = tuple(_message(value, f"messages[{i}]") for i, value in enumerate(raw))
    if messages[-1].role != "user":
        raise refused("messages", "the last one must be the user's: it is what is answered")
    log_probs = fields.flag("logprobs")
    if fields.whole("top_logprobs", 0, 0, 20):
        raise refused("top_logprobs", "only 0 is supported: logprobs tells of the chosen tokens alone")
    return ChatCall(_options(fields, max_choices, log_probs), messages)


def parse_text(body: bytes, max_choices: int, vocab_size: int) -> TextCall:
    """The body of `POST /v1/completions`; ApiError 400 names the field that is wrong."""
    fields = Fields(parse_object(body))
    fields.text("model")
    _check_unsupported(fields)
    prompts = _prompts(fields.values.get("prompt"), vocab_size)
    if fields.whole("logprobs", 0, 0, 20):
        raise refused("logprobs", "only 0 is supported: it tells of the chosen tokens alone")
    options = _options(fields, max_choices, log_probs=fields.given("logprobs"))
    if options.n * len(prompts) > max_choices:
        asked = f"{len(prompts)} prompts of {options.n} choices"
        raise refused("prompt", f"{asked}, and at most {max_choices} are made in one request")
    return TextCall(options, prompts)


def _options(fields: Fields, max_choices: int, log_probs: bool) -> Options:
    names = [name for name in ("max_completion_tokens", "max_tokens") if fields.given(name)]
    limits = {name: fields.whole(name, None, 1, _WHOLE) for name in names}
    if len(set(limits.values())) > 1:
        raise refused("max_completion_tokens", "contradicts max_tokens: give one of them")
    stream = fields.flag("stream")
    stream_options = fields.object("stream_options")
    if fields.given("stream_options") and not stream:
        raise refused("stream_options", "only allowed when stream is true")
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise refused("top_p", "must be more than 0; temperature 0 takes the likeliest token")
    temperature = fields.number("temperature", 1.0, 0.0, MAX_TEMPERATURE)
    # -1 is how vLLM's clients say all.
    top_k = fields.whole("top_k", 0, -1, _WHOLE) or 0
    return Options(
        model=fields.text("model"),
        stream=stream,
        include_usage=stream_options.flag("include_usage"),
        n=fields.whole("n", 1, 1, max_choices) or 1,
        seed=fields.whole("seed", None, -(1 << 63), (1 << 63) - 1),
        max_tokens=next(iter(limits.values()), None),
        max_tokens_field=names[0] if names else "max_tokens",
        temperature=temperature if temperature >= _GREEDY else 0.0,
        top_p=top_p,
        top_k=max(0, top_k),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        stop=_stop(fields.values.get("stop")),
        log_probs=log_probs,
    )


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    elif not isinstance(value, list):
        raise refused("stop", f"must be a string or an array of strings, it is {kind(value)}")
    if len(value) > MAX_STOPS:
        raise refused("stop", f"at most {MAX_STOPS} strings, there are {len(value)}")
    for index, one in enumerate(value):
        name = f"stop[{index}]"
        if not 1 <= len(text_of(one, name)) <= MAX_STOP_LENGTH:
            raise refused(name, f"must have 1 to {MAX_STOP_LENGTH} characters, it has {len(one)}")
    return tuple(value)


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise refused(name, f"must be an object, it is {kind(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise refused(f"{name}.role", f"must be one of {', '.join(_ROLES)}")
    for field in ("tool_calls", "function_call", "audio", "prefix"):
        if value.get(field):
            raise refused(f"{name}.{field}", "not supported: leave it out", "unsupported_parameter")
    return Message(_ROLES[role], _content(value.get("content"), f"{name}.content"))


def _content(value: Any, name: str) -> str:
    """A string, or the texts of a list of parts put together."""
    if not isinstance(value, list):
        if value is not None and not isinstance(value, str):
            raise refused(name, f"must be a string or an array of text parts, it is {kind(value)}")
        return text_of(value, name)
    texts = []
    for index, part in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(part, dict):
            raise refused(where, f"must be an object, it is {kind(part)}")
        if part.get("type") != "text":
            raise refused(f"{where}.type", 'only "text" is supported', "unsupported_parameter")
        texts.append(text_of(part.get("text"), f"{where}.text"))
    return "".join(texts)


def _prompts(value: Any, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """A string, a list of strings, a list of token ids, or a list of those."""
    if isinstance(value, str):
        return (text_of(value, "prompt"),)
    first = list_of(value, "prompt")[0]
    if isinstance(first, str):
        return tuple(text_of(one, f"prompt[{i}]") for i, one in enumerate(value))
    if isinstance(first, list):
        return tuple(_ids(one, f"prompt[{i}]", vocab_size) for i, one in enumerate(value))
    return (_ids(value, "prompt", vocab_size),)


def _ids(value: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    for index, one in enumerate(list_of(value, name)):
        if not isinstance(one, int) or isinstance(one, bool):
            raise refused(f"{name}[{index}]", f"must be a token id, it is {kind(one)}")
        if not 0 <= one < vocab_size:
            raise refused(f"{name}[{index}]", f"must be a token id of 0 to {vocab_size - 1}")
    return tuple(value)


def _empty(value: Any) -> bool:
    return not value


def _is(*neutral: Any) -> Callable[[Any], bool]:
    return lambda value: value in neutral and not isinstance(value, bool)


# What would change the answer, and the values with which it would not.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "tools": _empty,
    "tool_choice": lambda value: value in ("none", "auto"),
    "functions": _empty,
    "function_call": lambda value: value in ("none", "auto"),
    "response_format": lambda value: value == {"type": "text"},
    "structured_outputs": _empty,
    "guided_json": _empty,
    "guided_regex": _empty,
    "guided_choice": _empty,
    "guided_grammar": _empty,
    "logit_bias": _empty,
    "bad_words": _empty,
    "allowed_token_ids": _empty,
    "stop_token_ids": _empty,
    "echo": _empty,
    "best_of": _is(1),
    "suffix": _empty,
    "presence_penalty": _is(0),
    "frequency_penalty": _is(0),
    "repetition_penalty": _is(1),
    "min_tokens": _is(0),
    "ignore_eos": _empty,
    "use_beam_search": _empty,
    "prompt_logprobs": _empty,
    "modalities": lambda value: value == ["text"],
    "audio": _empty,
    "web_search_options": lambda value: False,
}


def _check_unsupported(fields: Fields) -> None:
    for name, neutral in _UNSUPPORTED.items():
        if fields.given(name) and not neutral(fields.values[name]):
            raise ApiError(
                400,
                f"{name}: not supported by this server, and it would change the answer: leave it out",
                name,
                "unsupported_parameter",
            )
