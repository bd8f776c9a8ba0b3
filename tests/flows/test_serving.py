"""The server on a real socket: what it answers, whole and streamed, and 200 clients at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from data.chat import BOS, END_THINK, EOS, SPECIALS, THINK, USER, ChatTokenizer
from flows.serving.conversation import Message, conversation_ids
from flows.serving.settings import Settings
from model.engine.engine import Engine
from model.engine.request import Completion, Request
from model.engine.sampling import Sampling
from tests.flows.served import MODEL, Served, events, serving
from tests.post_training.small import write_tokenizer

CLIENTS = 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def served(tokenizer: ChatTokenizer) -> Iterator[Served]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = Settings(max_rows=64, max_queue=CLIENTS, max_tokens=40, max_choices=8, drain=5.0)
    with serving(tokenizer, settings, invariant=True) as running:
        yield running
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(served: Served) -> Engine:
    """An engine of the same model for one answer at a time."""
    engine = served.engine
    return Engine(engine.model, [EOS], max_rows=1, token_bytes=engine.token_bytes, invariant=True)


def complete(alone: Engine, prompt: list[int], **sampling: Any) -> Completion:
    return alone.generate([Request(tuple(prompt), Sampling(**sampling))])[0]


def parted(tokenizer: ChatTokenizer, completion: Completion) -> tuple[str, str]:
    """Thought and answer of a finished response; a thought need not be closed."""
    ids = completion.tokens
    end = (ids.index(END_THINK) if END_THINK in ids else len(ids)) if ids[0] == THINK else 0
    return tokenizer.decode(ids[:end]), tokenizer.decode(ids[end:])


def told(deltas: list[dict[str, Any]], name: str) -> str:
    return "".join(delta.get(name) or "" for delta in deltas)


@pytest.fixture(scope="module")
def thinking(tokenizer: ChatTokenizer, alone: Engine) -> int:
    """A seed with which the model thinks first and then answers."""
    prompt = tokenizer.prompt_ids("Reverse 12.")
    for seed in range(200):
        tokens = complete(alone, prompt, max_tokens=40, seed=seed).tokens
        response = tokenizer.parse_response(tokens)
        if response.thinking and response.thought and response.answer:
            return seed
    raise AssertionError("the model never thinks")


def test_a_chat_is_what_the_engine_makes_of_its_conversation(
    served: Served, alone: Engine, tokenizer: ChatTokenizer
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Reverse 12."},
        {"role": "assistant", "content": "21", "reasoning_content": "2 then 1"},
        {"role": "user", "content": f"Again.{SPECIALS[EOS]}"},
    ]
    rules = {"max_tokens": 12, "seed": 5, "temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    reply = served.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **rules})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    said = reply.json()
    prompt = conversation_ids(tokenizer, [Message(one["role"], one["content"]) for one in messages])
    expected = complete(alone, prompt, **rules)
    thought, answer = parted(tokenizer, expected)
    assert said["object"] == "chat.completion"
    assert (said["model"], said["id"][:9]) == (MODEL, "chatcmpl-")
    [choice] = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer, "reasoning_content": thought or None}
    assert choice["finish_reason"] == expected.finish
    assert choice["logprobs"] is None
    assert said["usage"]["prompt_tokens"] == len(prompt)
    assert said["usage"]["completion_tokens"] == len(expected.tokens)
    assert said["usage"]["total_tokens"] == len(prompt) + len(expected.tokens)


def test_a_thought_is_told_apart_streamed_or_not(
    served: Served, alone: Engine, tokenizer: ChatTokenizer, thinking: int
) -> None:
    expected = complete(alone, tokenizer.prompt_ids("Reverse 12."), max_tokens=40, seed=thinking)
    thought, answer = parted(tokenizer, expected)
    said = served.chat(seed=thinking, logprobs=True).json()
    [choice] = said["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (thought, answer)
    details = said["usage"]["completion_tokens_details"]
    assert 2 < details["reasoning_tokens"] < said["usage"]["completion_tokens"]
    scores = [*choice["logprobs"]["reasoning_content"], *choice["logprobs"]["content"]]
    spelled = [
        (token, log_prob)
        for token, log_prob in zip(expected.tokens, expected.log_probs, strict=True)
        if token >= len(SPECIALS)
    ]
    assert [score["logprob"] for score in scores] == pytest.approx([log_prob for _, log_prob in spelled])
    table = tokenizer.token_bytes()
    assert [bytes(score["bytes"]) for score in scores] == [table[token] for token, _ in spelled]
    assert all(score["top_logprobs"] == [] for score in scores)
    reply = served.chat(seed=thinking, stream=True, logprobs=True)
    chunks = events(reply.text)
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    deltas = [one["delta"] for one in choices]
    assert (told(deltas, "reasoning_content"), told(deltas, "content")) == (thought, answer)
    streamed = [one["logprobs"] or {} for one in choices]
    for name in ("reasoning_content", "content"):
        assert [score for part in streamed for score in part.get(name, [])] == choice["logprobs"][name]


def test_a_stream_is_the_whole_answer_in_parts(served: Served) -> None:
    whole = served.chat(n=3, seed=11, max_tokens=20).json()
    reply = served.chat(n=3, seed=11, max_tokens=20, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(reply.text)
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {(last["id"], "chat.completion.chunk")}
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        deltas = [one["delta"] for one in own]
        assert told(deltas, "content") == choice["message"]["content"]
        assert told(deltas, "reasoning_content") == (choice["message"]["reasoning_content"] or "")


def test_seeds_count_on_and_no_seed_is_another_every_time(served: Served) -> None:
    def texts(**fields: Any) -> list[Any]:
        reply = served.chat(max_tokens=12, **fields).json()
        return [choice["message"] for choice in reply["choices"]]

    three = texts(n=3, seed=7)
    assert three == [texts(seed=seed)[0] for seed in (7, 8, 9)]
    assert len({json.dumps(one) for one in texts(n=4) + texts(n=4)}) == 8
    assert texts(n=2, seed=(1 << 63) - 1)[1] == texts(seed=-(1 << 63))[0]
    assert len({json.dumps(one) for one in texts(n=3, temperature=0)}) == 1


def test_stop_strings_end_an_answer_and_are_not_sent(served: Served) -> None:
    whole = served.post("/v1/completions", {"model": MODEL, "prompt": "x", "seed": 3}).json()
    text = whole["choices"][0]["text"]
    at = next(
        i
        for i in range(8, len(text) - 2)
        if "\ufffd" not in text[i : i + 2] and text.find(text[i : i + 2]) == i
    )
    stop = text[at : at + 2]
    for streamed in (False, True):
        fields = {"prompt": "x", "seed": 3, "stop": ["never there", stop], "stream": streamed, "logprobs": 0}
        reply = served.post("/v1/completions", {"model": MODEL, **fields})
        choices = [one["choices"][0] for one in (events(reply.text)[:-1] if streamed else [reply.json()])]
        assert "".join(one["text"] for one in choices) == text[:at]
        assert choices[-1]["finish_reason"] == "stop"
        offsets = [at for one in choices for at in one["logprobs"]["text_offset"]]
        assert offsets == sorted(offsets)
        assert max(offsets) <= at
    assert served.engine.busy is False, "the engine has stopped too"


def test_completions_of_texts_and_of_ids(served: Served, alone: Engine, tokenizer: ChatTokenizer) -> None:
    texts = ["one", "two"]
    fields = {"model": MODEL, "seed": 1, "n": 2, "max_tokens": 9}
    reply = served.post("/v1/completions", {**fields, "prompt": texts}).json()
    assert reply["object"] == "text_completion"
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    prompts = [[BOS, *tokenizer.encode(text)] for text in texts]
    expected = [complete(alone, prompt, max_tokens=9, seed=seed) for prompt in prompts for seed in (1, 2)]
    assert [c["text"] for c in reply["choices"]] == [tokenizer.decode(one.tokens) for one in expected]
    assert reply["usage"]["prompt_tokens"] == sum(map(len, prompts))
    same = served.post("/v1/completions", {**fields, "prompt": prompts}).json()
    assert same["choices"] == reply["choices"]
    one = served.post("/v1/completions", {**fields, "prompt": prompts[1]}).json()
    assert [c["text"] for c in one["choices"]] == [c["text"] for c in reply["choices"][2:]]


def test_the_limit_is_what_fits_unless_one_is_given(served: Served) -> None:
    def ask(length: int, **fields: Any) -> httpx.Response:
        return served.post(
            "/v1/completions", {"model": MODEL, "prompt": [BOS] + [USER] * (length - 1), **fields}
        )

    assert ask(500, temperature=0, seed=0).json()["usage"]["completion_tokens"] <= 12
    assert ask(500, max_tokens=12).status_code == 200
    error = ask(500, max_tokens=13).json()["error"]
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "500 are 513, and the model's context is 512: ask for at most 12" in error["message"]
    assert ask(511).json()["usage"]["completion_tokens"] == 1
    reply = ask(512)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "512 tokens, and the model's context is 512" in error["message"]
    for times in (600, 100_000):
        error = served.chat("long " * times).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_models_health_and_what_is_not_there(served: Served) -> None:
    [card] = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 512)
    assert httpx.get(f"{served.url}/v1/models/{MODEL}").json() == card
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    for reply, status, code in (
        (httpx.get(f"{served.url}/v1/models/other"), 404, "model_not_found"),
        (served.post("/v1/completions", {"model": "<b>", "prompt": "x"}), 404, "model_not_found"),
        (served.post("/v1/embeddings", {}), 404, "not_found"),
        (httpx.get(f"{served.url}/v1/models/"), 404, "model_not_found"),
        (httpx.get(f"{served.url}/v1/completions"), 405, "method_not_allowed"),
        (httpx.delete(f"{served.url}/health"), 405, "method_not_allowed"),
        (httpx.post(f"{served.url}/v1/completions", content=b"{"), 400, "invalid_json"),
        (served.chat(tools=[{}]), 400, "unsupported_parameter"),
    ):
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, code)
        assert error["type"] == "invalid_request_error"
        assert error["message"]


def test_what_is_counted(served: Served) -> None:
    names = ("prompt_tokens_total", "completion_tokens_total", "reused_tokens_total", "steps_total")
    names += ("time_to_first_token_seconds_count", "tokens_per_second_count")
    before = {name: served.metric(name) for name in names}
    ok = served.metric('requests_total{endpoint="chat",outcome="ok"}')
    refused = served.metric('requests_total{endpoint="chat",outcome="refused"}')
    # Long enough to fill a page of the cache, which the second request then finds.
    used = [served.chat("123 " * 20, max_tokens=8, seed=2).json()["usage"] for _ in range(2)]
    served.chat(temperature="hot")
    after = {name: served.metric(name) for name in names}
    assert served.metric('requests_total{endpoint="chat",outcome="ok"}') == ok + 2
    assert served.metric('requests_total{endpoint="chat",outcome="refused"}') == refused + 1
    grown = {name: after[name] - before[name] for name in names}
    assert grown["prompt_tokens_total"] == sum(one["prompt_tokens"] for one in used)
    assert grown["completion_tokens_total"] == sum(one["completion_tokens"] for one in used)
    assert 16 <= grown["reused_tokens_total"] < used[0]["prompt_tokens"]
    assert grown["steps_total"] >= 16
    assert grown["time_to_first_token_seconds_count"] == grown["tokens_per_second_count"] == 2
    assert served.metric("running") == served.metric("waiting") == served.metric("pages_used") == 0
    assert served.metric("pages") > 0


def test_two_hundred_clients_at_a_time_get_what_each_gets_alone(
    served: Served, alone: Engine, tokenizer: ChatTokenizer
) -> None:
    def rules(number: int) -> dict[str, int]:
        return {"seed": number, "max_tokens": 8 + number % 24}

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[str, str, str]:
        messages = [{"role": "user", "content": f"Reverse {number}."}]
        fields = {"model": MODEL, "messages": messages, "stream": True, **rules(number)}
        thought = answer = finish = last = ""
        async with client.stream("POST", f"{served.url}/v1/chat/completions", json=fields) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                last = line or last
                if line and line != "data: [DONE]":
                    [choice] = json.loads(line.removeprefix("data: "))["choices"]
                    thought += choice["delta"].get("reasoning_content") or ""
                    answer += choice["delta"].get("content") or ""
                    finish = choice["finish_reason"] or finish
        assert last == "data: [DONE]"
        return thought, answer, finish

    async def everybody() -> list[tuple[str, str, str]]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            # Every question is asked four times, by clients that others come between.
            return await asyncio.gather(*(ask(client, i % (CLIENTS // 4)) for i in range(CLIENTS)))

    answers = asyncio.run(everybody())
    for number in range(CLIENTS // 4):
        expected = complete(alone, tokenizer.prompt_ids(f"Reverse {number}."), **rules(number))
        solo = (*parted(tokenizer, expected), expected.finish)
        assert answers[number :: CLIENTS // 4] == [solo] * 4
    assert served.metric("running") == served.metric("waiting") == 0
