"""The cache's books: pages, who uses them, what is in them, and what happens when things go wrong."""

import math
import random

import pytest
import torch

from model.engine import draft, reading
from model.engine.engine import Engine
from model.engine.errors import RequestError
from model.engine.pages import PAGE
from model.engine.request import Completion, Request
from model.engine.sampling import Sampling
from tests.model.test_engine import WAYS, ask, name, scored
from tests.model.tiny import TINY, tiny


def check(engine: Engine) -> None:
    """Every page is free, idle or used, by as many rows as the books say; every row is somewhere."""
    pages, rows = engine.pages, engine._rows
    users: dict[int, int] = {}
    for row in rows.running:
        assert rows.table[row.line, : len(row.pages)].tolist() == row.pages
        for page in row.pages:
            users[page] = users.get(page, 0) + 1
    for page in range(1, len(pages._users)):
        assert pages._users[page] == users.get(page, 0)
        assert (page in users) + (page in pages._free) + (page in pages._idle) == 1
    assert {page: key for key, page in pages._known.items()} == pages._key
    assert set(pages._idle) <= set(pages._key)
    assert pages._free <= pages._ordered
    assert len(pages._users) - 1 <= pages.limit
    assert sorted([row.line for row in rows.running] + rows.lines) == list(range(rows.max_rows))
    assert len(engine._live) == engine.rows + engine.waiting


def drive(engine: Engine, requests: list[Request], rng: random.Random) -> dict[int, Completion]:
    """Submit at random moments, cancel some, check the books at every step; what the others made."""
    made: dict[int, Completion] = {}
    wanted: dict[int, int] = {}
    left = list(enumerate(requests))
    while left or engine.busy:
        while left and rng.random() < 0.6:
            number, request = left.pop(0)
            ticket = engine.submit(request)
            wanted[ticket], made[ticket] = number, Completion()
        if made and rng.random() < 0.06:
            ticket = rng.choice(list(made))
            engine.cancel(ticket)
            if (
                made[ticket].finish != "stop"
                and len(made[ticket].tokens) < requests[wanted[ticket]].sampling.max_tokens
            ):
                del made[ticket]
        for update in engine.step():
            made[update.ticket].add(update)
        check(engine)
    return {wanted[ticket]: completion for ticket, completion in made.items()}


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_any_mixture_of_requests_is_answered_as_the_forward_pass_would(options, monkeypatch):
    monkeypatch.setattr(reading, "LONG", 24)
    monkeypatch.setattr(reading, "PIECES", 2)
    model = tiny(rope_factor=4.0)
    rng = random.Random(str(options))
    stems = [tuple(rng.randrange(TINY.vocab_size) for _ in range(48)) for _ in range(3)]
    requests = []
    for seed in range(24):
        # Prompts that are equal, that begin alike, and that end with a page.
        prompt = rng.choice(stems)[: rng.choice([1, 5, 15, 16, 17, 31, 32, 40, 48])]
        requests.append(Request(prompt, Sampling(rng.choice([1, 2, 9, 20]), float(seed % 2), seed=seed)))
    engine = Engine(model, [7], **options)
    answers = drive(engine, requests, rng)
    assert len(answers) > 12
    assert engine.pages.used == 0
    for number, answer in answers.items():
        prompt = requests[number].prompt
        expected = scored(model, prompt, answer.tokens).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert answer.log_probs == pytest.approx(expected.tolist(), abs=3e-5)


def test_a_long_row_beside_short_ones_reads_its_own_cache(monkeypatch):
    """Rows of very different lengths, read in one piece, in pieces, and gathered."""
    model = tiny(rope_factor=16.0)
    lengths = (300, 290, 150, 40, 3)
    prompts = [tuple(i * n % 71 for i in range(1, n + 1)) for n in lengths]
    requests = ask(prompts, max_tokens=40)
    expected = Engine(model, []).generate(requests)
    for longest, pieces in ((64, 8), (64, 1), (128, 2)):
        monkeypatch.setattr(reading, "LONG", longest)
        monkeypatch.setattr(reading, "PIECES", pieces)
        answers = Engine(model, []).generate(requests)
        assert [a.tokens for a in answers] == [a.tokens for a in expected]
    for prompt, answer in zip(prompts, expected, strict=True):
        wanted = scored(model, prompt, answer.tokens).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert answer.log_probs == pytest.approx(wanted.tolist(), abs=3e-5)


def test_a_large_group_of_short_answers_does_not_queue_up_behind_its_first():
    engine = Engine(tiny(rope_factor=4.0), [])
    engine.generate(ask([tuple(range(40))] * 64, max_tokens=1))
    assert engine.figures.steps <= 3


def test_others_are_served_while_a_group_waits_for_its_prompt():
    engine = Engine(tiny(rope_factor=4.0), [], max_rows=2, chunk=8)
    for request in ask([tuple(range(60))] * 30, max_tokens=2):
        engine.submit(request)
    other = engine.submit(ask([(3,)], max_tokens=1)[0])
    steps = next(n for n in range(99) for update in engine.step() if update.ticket == other)
    assert steps <= 1


def test_the_end_of_a_chain_gives_way_before_its_beginning():
    model = tiny(rope_factor=4.0)
    engine = Engine(model, [], cache_tokens=8 * PAGE)
    first = tuple(range(70))
    engine.generate(ask([first], max_tokens=2))
    # Takes some of the first prompt's pages, and not those without which the rest is of no use.
    engine.generate(ask([tuple(range(70, 10, -1))], max_tokens=2))
    before = engine.figures.reused_tokens
    engine.generate(ask([first], max_tokens=2))
    engine._step()
    assert engine._rows.reused - before >= 2 * PAGE


def test_a_request_that_has_to_wait_takes_nothing_from_the_cache():
    engine = Engine(tiny(rope_factor=4.0), [], cache_tokens=9 * PAGE)
    engine.generate(ask([tuple(range(64))], max_tokens=1))
    known = dict(engine.pages._known)
    engine.submit(ask([tuple(range(70, 20, -1))], max_tokens=30)[0])
    engine.step()
    engine.submit(ask([tuple(range(1, 71)) + (5,) * 5], max_tokens=30)[0])
    reused = engine._rows.reused
    for _ in range(4):
        engine.step()
        assert engine.waiting == 1
    assert engine._rows.reused == reused
    assert set(engine.pages._known) >= set(known)


@pytest.mark.parametrize("drafts", [0, 2])
def test_shared_pages_are_not_written(drafts):
    model = tiny(rope_factor=4.0)
    engine = Engine(model, [], drafts=drafts)
    engine.generate(ask([tuple(range(48))], max_tokens=20))
    before = {
        p: [latents[p * PAGE : (p + 1) * PAGE].clone() for latents in engine.pages.latents]
        for p in engine.pages._key
    }
    assert len(before) >= 3
    for prompt in (tuple(range(48)), tuple(range(47)), (*range(48), 5, 6)):
        engine.generate(ask([prompt, prompt], max_tokens=9))
    for page, contents in before.items():
        for latents, content in zip(engine.pages.latents, contents, strict=True):
            assert torch.equal(latents[page * PAGE : (page + 1) * PAGE], content)


def test_pages_filled_after_a_swap_of_weights_serve_nobody():
    old, new = tiny(0, rope_factor=4.0), tiny(1, rope_factor=4.0)
    engine = Engine(old, [])
    prompt = tuple(range(20))
    [request] = ask([prompt], max_tokens=40, temperature=0.0)
    engine.submit(request)
    tokens = [token for _ in range(3) for update in engine.step() for token in update.tokens]
    engine.refresh(new)
    check(engine)
    while engine.busy:
        tokens += [token for update in engine.step() for token in update.tokens]
    turn = (*prompt, *tokens)
    answer = engine.generate(ask([turn], max_tokens=5, temperature=0.0))[0]
    assert engine.figures.reused_tokens == 0
    assert scored(new, turn, answer.tokens).argmax(-1).tolist() == answer.tokens


def test_a_new_leader_s_pages_are_not_forked_from_old_weights():
    old, new = tiny(0), tiny(1)
    engine = Engine(old, [])
    requests = ask([tuple(range(20))] * 2, max_tokens=9, temperature=0.0)
    engine.submit(requests[0])
    engine.step()
    engine.refresh(new)
    second = engine.submit(requests[1])
    tokens = [
        t for _ in range(12) for update in engine.step() if update.ticket == second for t in update.tokens
    ]
    assert scored(new, tuple(range(20)), tokens).argmax(-1).tolist() == tokens


def broken(model, token: int):
    """The same model, but one token's embedding is NaN."""
    with torch.no_grad():
        model.embed_tokens[token] = float("nan")
    return model


@pytest.mark.parametrize("options", [{}, {"drafts": 2}, {"invariant": True}, {"chunk": 4}], ids=name)
def test_a_request_whose_output_is_not_finite_fails_alone(options):
    model = broken(tiny(), 70)
    requests = ask([(3, 9, 4), (5, 70, 2), (33, 2, 2, 7)], max_tokens=20, top_k=3)
    engine = Engine(model, [], max_rows=2, **options)
    found = {engine.submit(r): Completion() for r in requests}
    while engine.busy:
        for update in engine.step():
            found[update.ticket].add(update)
        check(engine)
    one, failed, three = found.values()
    assert (failed.finish, failed.tokens) == ("failed", [])
    for request, answer in ((requests[0], one), (requests[2], three)):
        assert answer.finish == "length"
        expected = scored(model, request.prompt, answer.tokens).gather(
            1, torch.tensor(answer.tokens)[:, None]
        )
        assert answer.log_probs == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    with pytest.raises(RequestError, match="request 1: the model's output is not finite"):
        engine.generate(requests)
    assert not engine.busy


def test_an_engine_recovers_when_its_model_does():
    model = tiny()
    good = {key: value.clone() for key, value in model.state_dict().items()}
    engine = Engine(model, [])
    expected = engine.generate(ask(max_tokens=20))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(RequestError, match="not finite"):
        engine.generate(ask(max_tokens=20))
    model.load_state_dict(good)
    again = engine.generate(ask(max_tokens=20))
    assert [(a.tokens, a.log_probs) for a in again] == [(a.tokens, a.log_probs) for a in expected]


@pytest.mark.parametrize("where", ["take", "copy", "publish", "clean"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_step_that_breaks_leaves_an_engine_that_works(where, drafts, monkeypatch):
    model = tiny(rope_factor=4.0)
    requests = ask([tuple(range(40))] * 4 + [(5,)], max_tokens=9)
    expected = Engine(model, []).generate(requests)
    engine = Engine(model, [], drafts=drafts)
    real = getattr(engine.pages, where)
    for after in (0, 1):
        engine.refresh()
        calls = [0]

        def failing(*arguments, calls=calls, after=after):
            calls[0] += 1
            if calls[0] > after:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(engine.pages, where, failing)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(requests)
        monkeypatch.setattr(engine.pages, where, real)
        assert not engine.busy
        check(engine)
        assert [a.tokens for a in engine.generate(requests)] == [a.tokens for a in expected]


@pytest.mark.parametrize("prompt", [[1, 2], (1.0, 2), ("a",), (True, None)], ids=str)
def test_prompts_of_other_types_are_taken_or_refused_at_once(prompt):
    engine = Engine(tiny(), [])
    if prompt == [1, 2]:
        assert len(engine.generate([Request(prompt, Sampling(3))])[0].tokens) == 3
    else:
        with pytest.raises(RequestError, match="the prompt holds token"):
            engine.submit(Request(prompt))
    assert not engine.busy


@pytest.mark.parametrize("field", ["context", "cache_tokens", "drafts"])
def test_options_below_zero_are_named(field):
    with pytest.raises(RequestError, match=f"{field} is -1"):
        Engine(tiny(), [], **{field: -1})


def group(count: int = 12) -> list[Request]:
    return ask([tuple(range(1, 61)) * 2] * count, max_tokens=4)


@pytest.mark.parametrize("how", ["cancel", "refresh", "give way"])
def test_a_group_whose_leader_goes_away_still_reads_its_prompt_once(how):
    engine = Engine(tiny(rope_factor=16.0), [], chunk=16)
    first, *_ = [engine.submit(request) for request in group()]
    engine.step()
    if how == "cancel":
        engine.cancel(first)
    elif how == "refresh":
        engine.refresh()
    else:
        row = engine._live[first]
        engine._rows._drop(row)
        engine._rows._first(row)
    while engine.busy:
        engine.step()
        check(engine)
    # Twice: what was lost with the first reading is read again, and each row reads its last token.
    assert 12 * 120 - engine._rows.reused < 2 * 120 + 2 * 12 * 4 + 60


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_group_of_answers_that_end_at_once_reads_its_prompt_once(drafts):
    engine = Engine(tiny(rope_factor=16.0), [], drafts=drafts)
    engine.generate(ask([tuple(range(1, 61)) * 2] * 12, max_tokens=1))
    assert engine.figures.steps <= 3
    # The second to last token is read again with drafts, for its state.
    assert engine.figures.reused_tokens >= 11 * (112 - drafts)


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_is_not_finite_behind_an_accepted_draft_is_no_answer(drafts, monkeypatch):
    model = tiny()
    sound = Engine(model, []).generate(ask([(3, 7, 9)], max_tokens=15, temperature=0.0))[0]
    with torch.no_grad():
        model.layers[-1].mlp.experts.down_proj[6] = float("nan")
    engine = Engine(model, [], drafts=drafts)
    real = draft.draft

    def told(forward, rows, read, hidden, ended):
        """Drafts that are right, so that they are accepted."""
        real(forward, rows, read, hidden, ended)
        for row, _, _ in read:
            row.drafts = sound.tokens[row.made : row.made + drafts] if row.ticket not in ended else []

    monkeypatch.setattr("model.engine.engine.draft", told)
    engine.submit(ask([(3, 7, 9)], max_tokens=15, temperature=0.0)[0])
    found = Completion()
    while engine.busy:
        for update in engine.step():
            found.add(update)
    assert found.finish == "failed"
    assert 0 < len(found.tokens) < 15
    assert found.tokens == sound.tokens[: len(found.tokens)]
    assert all(math.isfinite(one) for one in found.log_probs)
    assert drafts == 0 or engine.figures.accepted_tokens > 0
