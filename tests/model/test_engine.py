"""Generation against the plain forward pass."""

import pytest
import torch

from model.engine.engine import Completion, Engine, Request, _Batch
from model.engine.sampling import Sampling
from tests.model.tiny import TINY, tiny

PROMPTS = [(3, 9, 4), (5,), (3, 9, 4, 8, 8, 2, 60, 1, 17), (3, 9, 4), (33, 2, 2, 7)]


def scored(model, prompt: tuple[int, ...], answer: list[int]) -> torch.Tensor:
    """Log-probabilities at the answer's positions, by one forward pass: [answer, vocabulary]."""
    with torch.no_grad():
        states = model(torch.tensor([[*prompt, *answer]])).states_BTD[0]
        return model.logits(states)[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("rope_factor", [1.0, 4.0])
def test_greedy_takes_the_best_token_of_the_forward_pass_and_reports_its_log_probability(rope_factor):
    model = tiny(rope_factor=rope_factor)
    length = model.config.max_position_embeddings - 12
    answers = Engine(model, [TINY.vocab_size]).generate(
        [Request(p) for p in PROMPTS], Sampling(max_tokens=length, temperature=0.0)
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.tokens) == length
        expected = scored(model, prompt, answer.tokens)
        assert expected.argmax(-1).tolist() == answer.tokens
        assert answer.log_probs == pytest.approx(expected.amax(-1).tolist(), abs=1e-5)


def test_sampled_log_probabilities_are_the_trainer_s_at_any_temperature():
    model = tiny()
    requests = [Request(p, seed) for seed, p in enumerate(PROMPTS)]
    for temperature in (1.0, 0.3):
        answers = Engine(model, []).generate(requests, Sampling(max_tokens=20, temperature=temperature))
        for request, answer in zip(requests, answers, strict=True):
            expected = scored(model, request.prompt, answer.tokens)
            picked = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert answer.log_probs == pytest.approx(picked.tolist(), abs=1e-5)


def test_an_answer_is_the_same_alone_in_a_batch_and_in_a_crowded_queue():
    model = tiny()
    requests = [Request(PROMPTS[i % 5], seed=i) for i in range(14)]
    sampling = Sampling(max_tokens=16, temperature=1.0, top_p=0.9)
    # Tokens 0 to 9 stop, so rows leave at different times and others take their places.
    together = Engine(model, range(10), max_rows=64).generate(requests, sampling)
    crowded = Engine(model, range(10), max_rows=3).generate(requests, sampling)
    alone = [Engine(model, range(10), max_rows=1).generate([r], sampling)[0] for r in requests]
    assert len({len(answer.tokens) for answer in together}) > 3
    for one, two, three in zip(together, crowded, alone, strict=True):
        assert one.tokens == two.tokens == three.tokens
        assert one.finish == two.finish == three.finish
        assert one.log_probs == pytest.approx(three.log_probs, abs=1e-5)
        assert one.log_probs == pytest.approx(two.log_probs, abs=1e-5)


def test_requests_with_one_prompt_share_its_reading_and_not_their_random_numbers(monkeypatch):
    read = []
    real = _Batch._prefill

    def counting(self, prompts, lengths):
        read.extend(prompts)
        return real(self, prompts, lengths)

    monkeypatch.setattr(_Batch, "_prefill", counting)
    requests = [Request(PROMPTS[0], seed) for seed in range(6)] + [Request(PROMPTS[1], 0)]
    answers = Engine(tiny(), []).generate(requests, Sampling(max_tokens=12))
    assert sorted(read) == sorted(PROMPTS[:2])
    assert len({tuple(answer.tokens) for answer in answers}) == 7
    again = Engine(tiny(), []).generate(requests, Sampling(max_tokens=12))
    assert [a.tokens for a in again] == [a.tokens for a in answers]


def test_stop_and_length():
    model = tiny()
    free = Engine(model, []).generate([Request(PROMPTS[2])], Sampling(max_tokens=9, temperature=0.0))[0]
    assert (len(free.tokens), free.finish) == (9, "length")
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    sampling = Sampling(max_tokens=9, temperature=0.0)
    ended = Engine(model, [stop]).generate([Request(PROMPTS[2])], sampling)[0]
    assert ended.tokens == free.tokens[: first + 1]
    assert ended.finish == "stop"
    # The stop token on the last allowed position still counts as a stop.
    last = Engine(model, [stop]).generate([Request(PROMPTS[2])], Sampling(first + 1, temperature=0.0))[0]
    assert last.finish == "stop"
    assert Engine(model, [stop]).generate([], sampling) == []
    assert Completion() == Completion([], [], "length")


def test_prompt_and_answer_fill_the_context_and_no_more():
    model = tiny()
    context = model.config.max_position_embeddings
    prompts = [tuple(range(1, n)) for n in (context, context - 3, 2)]
    answers = Engine(model, []).generate([Request(p) for p in prompts], Sampling(max_tokens=500))
    assert [len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True)] == [context] * 3
    assert {a.finish for a in answers} == {"length"}


@pytest.mark.parametrize("prompt", [(), tuple(range(32))], ids=["empty", "too long"])
def test_a_prompt_that_does_not_fit_is_named(prompt):
    with pytest.raises(ValueError, match=r"request 1: a prompt of \d+ tokens; between 1 and 31 fit"):
        Engine(tiny(), []).generate([Request((1,)), Request(prompt)], Sampling())


def test_a_larger_context_can_be_asked_of_a_model():
    model = tiny()
    prompt = tuple(i % TINY.vocab_size for i in range(40))
    answer = Engine(model, [], context=60).generate([Request(prompt)], Sampling(100, temperature=0.0))[0]
    assert len(answer.tokens) == 20
    assert scored(model, prompt, answer.tokens).argmax(-1).tolist() == answer.tokens


def test_a_model_trains_on_after_generating():
    """Tables made while generating are used by the next backward pass, and the caches keep no graph."""
    model = tiny()
    Engine(model, []).generate([Request((1, 2))], Sampling(max_tokens=3))
    assert not model.training
    model.train()
    model.logits(model(torch.tensor([[1, 2, 3]])).states_BTD[0]).sum().backward()
    assert torch.isfinite(model.embed_tokens.grad).all()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp8", 0.6)])
def test_other_precisions_decode_near_their_own_forward_pass(precision, tolerance):
    """Absorbed and expanded products round differently, so this is a bound on rounding, not on bits."""
    model = tiny(precision=precision, initializer_range=0.1)
    requests = [Request(p, seed) for seed, p in enumerate(PROMPTS)]
    answers = Engine(model, []).generate(requests, Sampling(max_tokens=12))
    for request, answer in zip(requests, answers, strict=True):
        picked = scored(model, request.prompt, answer.tokens).gather(1, torch.tensor(answer.tokens)[:, None])
        assert answer.log_probs == pytest.approx(picked[:, 0].tolist(), abs=tolerance)
