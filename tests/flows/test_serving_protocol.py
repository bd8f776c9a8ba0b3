"""What a client may ask, and how it is told what it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flows.serving.conversation import Message
from flows.serving.errors import ApiError
from flows.serving.protocol import parse_chat, parse_text

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps({**ASKED, **fields}).encode(), 8)


def text(**fields: Any) -> Any:
    return parse_text(json.dumps({"model": "m", "prompt": "hi", **fields}).encode(), 8, 320)


def test_defaults_and_everything_given() -> None:
    options = chat(user="somebody", metadata={"a": 1}, store=True, temperature=None).options
    assert (options.n, options.seed, options.max_tokens, options.stop) == (1, None, None, ())
    assert (options.temperature, options.top_p, options.top_k, options.min_p) == (1.0, 1.0, 0, 0.0)
    assert not any((options.stream, options.include_usage, options.log_probs))
    options = chat(
        stream=True,
        stream_options={"include_usage": True},
        n=3,
        seed=-5,
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=0,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
    ).options
    assert (options.n, options.seed, options.max_tokens, options.stop) == (3, -5, 7, ("a", "b"))
    assert (options.temperature, options.top_p, options.top_k, options.min_p) == (0.0, 0.5, 0, 0.1)
    assert options.stream
    assert options.include_usage
    assert options.log_probs
    assert chat(stop="x").options.stop == ("x",)
    assert chat(max_tokens=3, max_completion_tokens=3).options.max_tokens == 3
    # Too small to divide by, and long since the same as greedy.
    assert chat(temperature=1e-30).options.temperature == 0.0


def test_messages_of_every_form() -> None:
    messages = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "reasoning_content": "why c", "tool_calls": None},
            {"role": "user", "content": "", "name": "somebody"},
        ]
    ).messages
    assert messages == (
        Message("system", "be brief"),
        Message("user", "ab"),
        Message("assistant", "c"),
        Message("user", ""),
    )


def test_prompts_of_every_form() -> None:
    assert text(prompt="a").prompts == ("a",)
    assert text(prompt=["a", ""]).prompts == ("a", "")
    assert text(prompt=[0, 319]).prompts == ((0, 319),)
    assert text(prompt=[[1], [2, 3]]).prompts == ((1,), (2, 3))
    assert text(logprobs=0).options.log_probs
    assert not text().options.log_probs
    assert text(best_of=1, echo=False, suffix="").options.n == 1


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": None}, "model", "missing"),
        ({"model": 5}, "model", "must be a string, it is a whole number"),
        ({"messages": None}, "messages", "must be an array, it is null"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": ["hi"]}, "messages[0]", "must be an object, it is a string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "one of system, developer"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a string, it is null"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "or an array of text parts"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "must be an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            'only "text"',
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "the last one must be the user's"),
        (
            {"messages": [{"role": "assistant", "content": "x", "prefix": True}]},
            "messages[0].prefix",
            "not supported",
        ),
        ({"max_tokens": 0}, "max_tokens", "between 1 and"),
        ({"max_tokens": 5.0}, "max_tokens", "must be a whole number, it is a number"),
        ({"max_tokens": True}, "max_tokens", "it is true or false"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "contradicts max_tokens"),
        ({"temperature": "hot"}, "temperature", "must be a number, it is a string"),
        ({"temperature": 2.1}, "temperature", "between 0 and 2"),
        ({"temperature": -1}, "temperature", "between 0 and 2"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"top_p": 10**400}, "top_p", "between 0 and 1"),
        ({"min_p": 1.5}, "min_p", "between 0 and 1"),
        ({"top_k": -2}, "top_k", "between -1 and"),
        ({"seed": 1 << 63}, "seed", "between"),
        ({"n": 9}, "n", "between 1 and 8"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream"),
        ({"stream": True, "stream_options": []}, "stream_options", "must be an object, it is an array"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ["a", ""]}, "stop[1]", "1 to 256 characters"),
        ({"stop": ["a", 1]}, "stop[1]", "must be a string"),
        ({"stop": 1}, "stop", "a string or an array of strings"),
        ({"logprobs": 2}, "logprobs", "must be true or false"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "only 0 is supported"),
        ({"tools": [{"type": "function"}]}, "tools", "would change the answer"),
        ({"tool_choice": "required"}, "tool_choice", "would change the answer"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "would change the answer"),
        ({"logit_bias": {"50": 1}}, "logit_bias", "would change the answer"),
        ({"presence_penalty": 0.5}, "presence_penalty", "would change the answer"),
        ({"frequency_penalty": True}, "frequency_penalty", "would change the answer"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "would change the answer"),
        ({"modalities": ["audio"]}, "modalities", "would change the answer"),
    ],
)
def test_a_chat_field_that_is_wrong_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(**fields)
    assert (raised.value.status, raised.value.param) == (400, param)
    assert message in raised.value.message
    assert raised.value.message.startswith(param)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "must be an array, it is null"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": ["a", 1]}, "prompt[1]", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt[1]", "must be a token id, it is a string"),
        ({"prompt": [1, 320]}, "prompt[1]", "of 0 to 319"),
        ({"prompt": [[1], []]}, "prompt[1]", "must not be empty"),
        ({"prompt": [[1], 2]}, "prompt[1]", "must be an array"),
        ({"prompt": ["a"] * 5, "n": 2}, "prompt", "at most 8 are made"),
        ({"logprobs": 1}, "logprobs", "only 0 is supported"),
        ({"logprobs": True}, "logprobs", "must be a whole number"),
        ({"echo": True}, "echo", "would change the answer"),
        ({"best_of": 2}, "best_of", "would change the answer"),
        ({"suffix": "x"}, "suffix", "would change the answer"),
    ],
)
def test_a_completion_field_that_is_wrong_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        text(**fields)
    assert (raised.value.status, raised.value.param) == (400, param)
    assert message in raised.value.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON at line 1, column 1"),
        (b'{"model": "m",\n "x": }', "not JSON at line 2, column 7"),
        (b'{"model": "\xff"}', "not UTF-8 at byte 11"),
        (b"[1]", "must be a JSON object, it is an array"),
        (b'{"seed": NaN}', "NaN is no JSON number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b"[" * 200_000, "nested too deep"),
    ],
)
def test_a_body_that_is_no_json_says_where(body: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as raised:
        parse_chat(body, 8)
    assert raised.value.envelope()["error"]["code"] == "invalid_json"
    assert raised.value.status == 400


def test_numbers_too_large_to_read_as_one_are_refused() -> None:
    body = (
        json.dumps({**ASKED, "temperature": 0}).replace('"temperature": 0', '"temperature": 1e999').encode()
    )
    with pytest.raises(ApiError, match="temperature: must be between 0 and 2, it is inf"):
        parse_chat(body, 8)
