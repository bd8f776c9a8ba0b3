"""Generation against the plain forward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.engine.engine import Engine
from model.engine.errors import RequestError
from model.engine.request import Completion, Request
from model.engine.sampling import Sampling
from model.optim.build import Optimizer, OptimizerConfig
from tests.model.tiny import TINY, tiny

PROMPTS = [(3, 9, 4), (5,), (3, 9, 4, 8, 8, 2, 60, 1, 17), (3, 9, 4), (33, 2, 2, 7)]
# Every way that tokens can be cut into steps. 96 tokens of cache are too few for five rows at once.
WAYS = [
    {},
    {"max_rows": 2},
    {"chunk": 1},
    {"chunk": 4},
    {"drafts": 1},
    {"drafts": 3},
    {"cache_tokens": 96},
    {"chunk": 3, "drafts": 2, "cache_tokens": 112, "max_rows": 4},
]


def name(options: dict) -> str:
    return " ".join(f"{key} {value}" for key, value in options.items()) or "plain"


def ask(prompts=PROMPTS, **sampling) -> list[Request]:
    return [Request(p, Sampling(**{"seed": i} | sampling)) for i, p in enumerate(prompts)]


def scored(model, prompt: tuple[int, ...], answer: list[int]) -> torch.Tensor:
    """Log-probabilities at the answer's positions, by one forward pass: [answer, vocabulary].

    Torch's fused attention takes an exponential of 20 bits, too coarse for what is compared with it.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        states = model(torch.tensor([[*prompt, *answer]])).states_BTD[0]
        return model.logits(states)[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("options", [*WAYS, {"invariant": True}], ids=name)
@pytest.mark.parametrize("rope_factor", [1.0, 4.0])
def test_greedy_takes_the_best_token_of_the_forward_pass_and_reports_its_log_probability(
    rope_factor, options
):
    model = tiny(rope_factor=rope_factor)
    length = min(40, model.config.max_position_embeddings - 12)
    engine = Engine(model, [TINY.vocab_size], **options)
    answers = engine.generate(ask(max_tokens=length, temperature=0.0))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.tokens) == length
        expected = scored(model, prompt, answer.tokens)
        assert expected.argmax(-1).tolist() == answer.tokens
        assert answer.log_probs == pytest.approx(expected.amax(-1).tolist(), abs=1e-5)
    assert engine.pages.used == 0
    assert not engine.busy


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_sampled_log_probabilities_are_the_trainer_s_at_any_temperature(options):
    model = tiny()
    for temperature in (1.0, 0.3):
        answers = Engine(model, [], **options).generate(ask(max_tokens=20, temperature=temperature))
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = scored(model, prompt, answer.tokens)
            picked = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert answer.log_probs == pytest.approx(picked.tolist(), abs=1e-5)


def test_an_answer_is_the_same_alone_in_a_batch_and_in_a_crowded_queue():
    model = tiny()
    requests = ask([PROMPTS[i % 5] for i in range(14)], max_tokens=16, top_p=0.9)
    # Tokens 0 to 9 stop, so rows leave at different times and others take their places.
    together = Engine(model, range(10), max_rows=64).generate(requests)
    crowded = Engine(model, range(10), max_rows=3).generate(requests)
    alone = [Engine(model, range(10), max_rows=1).generate([r])[0] for r in requests]
    assert len({len(answer.tokens) for answer in together}) > 3
    for one, two, three in zip(together, crowded, alone, strict=True):
        assert one.tokens == two.tokens == three.tokens
        assert one.finish == two.finish == three.finish
        assert one.log_probs == pytest.approx(three.log_probs, abs=1e-5)
        assert one.log_probs == pytest.approx(two.log_probs, abs=1e-5)


def test_every_request_has_its_own_rules():
    model = tiny()
    rules = [
        Sampling(max_tokens=3, temperature=0.0),
        Sampling(max_tokens=9, temperature=1.5, seed=4),
        Sampling(max_tokens=7, temperature=1.0, top_k=2, seed=4),
        Sampling(max_tokens=8, temperature=0.8, top_p=0.5, min_p=0.1, seed=9),
    ]
    requests = [Request(PROMPTS[0], r) for r in rules]
    together = Engine(model, []).generate(requests)
    assert [len(answer.tokens) for answer in together] == [3, 9, 7, 8]
    for request, answer in zip(requests, together, strict=True):
        assert Engine(model, []).generate([request])[0].tokens == answer.tokens


def test_a_group_reads_its_prompt_once_and_draws_its_own_random_numbers():
    model = tiny(rope_factor=4.0)
    prompt = tuple(range(5, 45))
    engine = Engine(model, [])
    answers = engine.generate(ask([prompt] * 6, max_tokens=12))
    assert len({tuple(answer.tokens) for answer in answers}) == 6
    # All but the last token, which each row reads for what follows it.
    assert engine.figures.prompt_tokens == 6 * 40
    assert engine.figures.reused_tokens == 5 * 39
    for answer in answers:
        expected = scored(model, prompt, answer.tokens).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert answer.log_probs == pytest.approx(expected.tolist(), abs=1e-5)
    again = Engine(model, []).generate(ask([prompt] * 6, max_tokens=12))
    assert [a.tokens for a in again] == [a.tokens for a in answers]


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_prompt_that_begins_as_an_earlier_one_reuses_its_pages(drafts):
    model = tiny(rope_factor=4.0)
    engine = Engine(model, [], drafts=drafts)
    first = engine.generate(ask([tuple(range(50))], max_tokens=30))[0]
    # A second turn of the conversation: what was answered counts too.
    turn = (*range(50), *first.tokens[:25], 7, 7)
    answer = engine.generate(ask([turn], max_tokens=10))[0]
    assert engine.figures.reused_tokens >= 64 - 1
    expected = scored(model, turn, answer.tokens).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert answer.log_probs == pytest.approx(expected.tolist(), abs=1e-5)
    # Another beginning finds nothing.
    before = engine.figures.reused_tokens
    engine.generate(ask([(70, *range(1, 50))], max_tokens=2))
    assert engine.figures.reused_tokens == before


def test_known_pages_give_way_when_others_need_them():
    model = tiny(rope_factor=4.0)
    engine = Engine(model, [], cache_tokens=128)
    for start in range(6):
        prompt = tuple(range(start, start + 60))
        answer = engine.generate(ask([prompt], max_tokens=30))[0]
        expected = scored(model, prompt, answer.tokens).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert answer.log_probs == pytest.approx(expected.tolist(), abs=2e-5)
    assert engine.pages.used == 0


def test_rows_that_give_way_come_back_with_the_same_answer():
    model = tiny()
    requests = ask(max_tokens=22)
    roomy, tight = Engine(model, []), Engine(model, [], cache_tokens=80)
    expected = roomy.generate(requests)
    assert [a.tokens for a in tight.generate(requests)] == [a.tokens for a in expected]
    assert roomy.figures.preemptions == 0
    assert tight.figures.preemptions > 0


def test_requests_come_and_go_while_others_run():
    model = tiny()
    requests = ask(max_tokens=14)
    alone = [Engine(model, []).generate([r])[0].tokens for r in requests]
    engine = Engine(model, [], chunk=2)
    made: dict[int, Completion] = {}
    tickets = []
    for number in range(60):
        if number % 3 == 0 and len(tickets) < len(requests):
            tickets.append(engine.submit(requests[len(tickets)]))
            made[tickets[-1]] = Completion()
        if number == 8:
            engine.cancel(tickets[1])
            engine.cancel(tickets[1])
        for update in engine.step():
            made[update.ticket].add(update)
    assert not engine.busy
    assert engine.step() == []
    assert len(made[tickets[1]].tokens) < 14
    for ticket, expected in zip(tickets, alone, strict=True):
        assert made[ticket].tokens == expected[: len(made[ticket].tokens)]
        assert ticket == tickets[1] or len(made[ticket].tokens) == 14
    assert engine.pages.used == 0


def test_a_long_prompt_does_not_hold_up_the_others():
    engine = Engine(tiny(rope_factor=4.0), [], chunk=8)
    short = engine.submit(ask([(1, 2)], max_tokens=60)[0])
    engine.step()
    engine.submit(ask([tuple(range(64))], max_tokens=2)[0])
    for _ in range(7):
        assert [update.ticket for update in engine.step()] == [short]


def test_stop_and_length():
    model = tiny()
    free = Engine(model, []).generate(ask(PROMPTS[2:3], max_tokens=9, temperature=0.0))[0]
    assert (len(free.tokens), free.finish) == (9, "length")
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    for options in ({}, {"drafts": 3}):
        ended = Engine(model, [stop], **options).generate(ask(PROMPTS[2:3], max_tokens=9, temperature=0.0))[0]
        assert ended.tokens == free.tokens[: first + 1]
        assert ended.finish == "stop"
        # The stop token on the last allowed position still counts as a stop.
        last = Engine(model, [stop], **options)
        assert last.generate(ask(PROMPTS[2:3], max_tokens=first + 1, temperature=0.0))[0].finish == "stop"
    assert Engine(model, [stop]).generate([]) == []
    assert Completion() == Completion([], [], "length")


def test_stop_strings_end_an_answer_wherever_tokens_are_cut():
    model = tiny()
    # Token i stands for the two bytes of one character; some strings begin in one token and end in another.
    table = [chr(0x400 + i).encode() for i in range(TINY.vocab_size)]
    free = Engine(model, []).generate(ask(PROMPTS[2:3], max_tokens=12, seed=3))[0]
    text = "".join(chr(0x400 + token) for token in free.tokens)
    for options in ({}, {"drafts": 2}):
        engine = Engine(model, [], token_bytes=table, **options)
        wanted = text[4:6]
        ended = engine.generate(ask(PROMPTS[2:3], max_tokens=12, seed=3, stop=("never", wanted)))[0]
        assert ended.tokens == free.tokens[: text.index(wanted) + 2]
        assert (ended.finish, ended.stopped_by) == ("stop", wanted)
        assert len(ended.log_probs) == len(ended.tokens)
    with pytest.raises(RequestError, match="token_bytes"):
        Engine(model, []).submit(ask(stop=("x",))[0])


@pytest.mark.parametrize("options", [{}, {"drafts": 2}], ids=name)
def test_prompt_and_answer_fill_the_context_and_no_more(options):
    model = tiny()
    context = model.config.max_position_embeddings
    prompts = [tuple(range(1, n)) for n in (context, context - 3, 2)]
    answers = Engine(model, [], **options).generate(ask(prompts, max_tokens=500))
    assert [len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True)] == [context] * 3
    assert {a.finish for a in answers} == {"length"}


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ((), r"request 1: a prompt of 0 tokens; between 1 and 31 fit"),
        (tuple(range(32)), r"request 1: a prompt of 32 tokens; between 1 and 31 fit"),
        ((5, 71), "request 1: the prompt holds token 71, and the model's vocabulary has 71"),
        ((5, -1), "request 1: the prompt holds token -1"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named_and_leaves_nothing_behind(prompt, complaint):
    engine = Engine(tiny(), [])
    with pytest.raises(ValueError, match=complaint):
        engine.generate([Request((1,)), Request(prompt)])
    assert not engine.busy


def test_an_engine_that_cannot_work_says_so():
    with pytest.raises(RequestError, match="no prediction module"):
        Engine(tiny(num_nextn_predict_layers=0), [], drafts=1)
    with pytest.raises(RequestError, match="max_rows is 0"):
        Engine(tiny(), [], max_rows=0)
    with pytest.raises(
        RequestError, match="may take 31 tokens and with them 2 pages of 16, and the cache has 1"
    ):
        Engine(tiny(), [], cache_tokens=16).submit(Request((1,), Sampling(max_tokens=30)))
    engine = Engine(tiny(), [])
    engine.submit(Request((1,)))
    with pytest.raises(RequestError, match="idle"):
        engine.generate([Request((1,))])


def test_a_larger_context_can_be_asked_of_a_model():
    model = tiny()
    prompt = tuple(i % TINY.vocab_size for i in range(40))
    answer = Engine(model, [], context=60).generate(ask([prompt], max_tokens=100, temperature=0.0))[0]
    assert len(answer.tokens) == 20
    assert scored(model, prompt, answer.tokens).argmax(-1).tolist() == answer.tokens


def test_weights_that_were_trained_on_are_read_again():
    model = tiny()
    engine = Engine(model, [])
    prompt = tuple(range(20))
    engine.generate(ask([prompt], max_tokens=5))
    # A fused optimizer, whose writes torch does not count.
    optimizer = Optimizer(model, OptimizerConfig(lr=0.02))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    answer = engine.generate(ask([prompt], max_tokens=5, temperature=0.0))[0]
    # Pages of the old weights are not used either.
    assert scored(model, prompt, answer.tokens).argmax(-1).tolist() == answer.tokens
    assert answer.log_probs == pytest.approx(scored(model, prompt, answer.tokens).amax(-1).tolist(), abs=1e-5)
    assert engine.figures.reused_tokens == 0


def test_weights_can_be_swapped_while_requests_run():
    old, new = tiny(0), tiny(1)
    engine = Engine(old, [])
    prompt = tuple(range(17))
    [request] = ask([prompt], max_tokens=12, temperature=0.0)
    engine.submit(request)
    first = [token for _ in range(3) for update in engine.step() for token in update.tokens]
    engine.refresh(new)
    rest = [token for _ in range(9) for update in engine.step() for token in update.tokens]
    assert not engine.busy
    assert scored(old, prompt, first).argmax(-1).tolist() == first
    assert len(first + rest) == 12
    # Another request finds neither the old pages nor those that were half of each.
    answer = engine.generate([request])[0]
    assert scored(new, prompt, answer.tokens).argmax(-1).tolist() == answer.tokens
    assert engine.figures.reused_tokens == 0
    with pytest.raises(RequestError, match="another configuration"):
        engine.refresh(tiny(hidden_size=40))


def test_a_model_trains_on_after_generating():
    """Tables made while generating are used by the next backward pass, and the caches keep no graph."""
    model = tiny()
    Engine(model, []).generate(ask([(1, 2)], max_tokens=3))
    model.train()
    model.logits(model(torch.tensor([[1, 2, 3]])).states_BTD[0]).sum().backward()
    assert torch.isfinite(model.embed_tokens.grad).all()


@pytest.mark.parametrize(("precision", "most", "furthest"), [("bf16", 0.05, 0.8), ("fp8", 0.2, 0.8)])
@pytest.mark.parametrize("options", [{}, {"invariant": True}, {"drafts": 1}], ids=name)
def test_other_precisions_decode_near_their_own_forward_pass(precision, most, furthest, options):
    """Absorbed and expanded products round differently, so this is a bound on rounding, not on bits. Now and
    then rounding turns a token to another expert, and its probabilities move further."""
    differences = []
    for seed in range(3):
        model = tiny(seed, precision=precision, initializer_range=0.1)
        answers = Engine(model, [], **options).generate(ask(max_tokens=12))
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            picked = scored(model, prompt, answer.tokens).gather(1, torch.tensor(answer.tokens)[:, None])
            differences.append((picked[:, 0] - torch.tensor(answer.log_probs)).abs())
    spread = torch.cat(differences)
    assert float(spread.quantile(0.9)) < most
    assert float(spread.max()) < furthest
