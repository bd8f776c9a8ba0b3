"""What the engine promises to the bit: answers depend on no batch, and drafts change none."""

import itertools
from dataclasses import replace

import pytest
import torch

from model.engine.engine import Engine
from model.engine.request import Completion, Request
from model.engine.sampling import Sampling
from model.engine.tiles import TILE, tiled
from model.loss import next_token_losses
from model.transformer import Transformer, build
from tests.model.test_engine import WAYS, name
from tests.model.tiny import TINY, tiny, tokens

WIDE = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "vocab_size": 512,
    "n_group": 1,
    "topk_group": 1,
}


def requests(count: int, most: int, vocab: int = TINY.vocab_size, **sampling) -> list[Request]:
    """Prompts of 1 to `most` tokens, some of them equal, greedy and sampled in turns."""
    found = []
    for i in range(count):
        prompt = tuple(tokens(1, 1 + i * 7 % most, seed=i % 9, vocab_size=vocab)[0].tolist())
        rules = {"max_tokens": 6 + i % 5, "temperature": float(i % 2), "seed": i}
        found.append(Request(prompt, Sampling(**rules | sampling)))
    return found


def same(found: list[Completion], expected: list[Completion]) -> bool:
    """Equal tokens, and log-probabilities equal in every bit."""
    return [(a.tokens, a.log_probs, a.finish) for a in found] == [
        (a.tokens, a.log_probs, a.finish) for a in expected
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("wide", [False, True], ids=["tiny", "wide"])
def test_an_answer_has_the_same_bits_whatever_else_is_in_the_batch(wide: bool, precision: str):
    model = tiny(precision=precision, **(WIDE if wide else {}))
    asked = requests(18, 20, model.config.vocab_size)
    alone = [Engine(model, range(3), invariant=True).generate([request])[0] for request in asked]
    assert len({len(answer.tokens) for answer in alone}) > 3
    for options in WAYS if precision == "fp32" else WAYS[-1:]:
        together = Engine(model, range(3), invariant=True, **options).generate(asked)
        assert same(together, alone), options
    backwards = Engine(model, range(3), invariant=True, max_rows=7).generate(asked[::-1])
    assert same(backwards[::-1], alone)


def test_a_long_context_has_the_same_bits_too():
    """Several chunks of cached positions, in tiles whose rows have different numbers of them."""
    model = tiny(rope_factor=16.0)
    asked = requests(6, 400, max_tokens=5)
    asked += [
        Request(tuple(tokens(1, n, seed=n)[0].tolist()), Sampling(5, seed=n)) for n in (127, 128, 129, 300)
    ]
    alone = [Engine(model, [], invariant=True).generate([request])[0] for request in asked]
    assert same(Engine(model, [], invariant=True, chunk=70).generate(asked), alone)
    assert same(Engine(model, [], invariant=True, drafts=2).generate(asked), alone)


def test_a_row_has_the_same_bits_at_every_place_of_a_tile():
    generator = torch.Generator().manual_seed(0)
    for width, out in ((36, 52), (64, 40), (256, 336), (7, 9)):
        weight = torch.randn(width, out, generator=generator)
        rows = torch.randn(40, width, generator=generator)

        def product(x, weight=weight):
            assert len(x) == TILE
            return (torch.nn.functional.silu(x @ weight),)

        (whole,) = tiled(product, rows)
        for place in (1, 5, 15, 16, 39):
            order = torch.randperm(40, generator=generator)
            order = torch.cat((order[order != 0][:place], torch.tensor([0]), order[order != 0][place:]))
            assert torch.equal(tiled(product, rows[order])[0][place], whole[0])
        assert torch.equal(tiled(product, rows[:1])[0][0], whole[0])


@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"max_rows": 2}, {"cache_tokens": 160}], ids=name)
def test_drafts_change_no_answer(options):
    model = tiny()
    asked = requests(12, 9, max_tokens=20)
    plain = Engine(model, range(2), invariant=True).generate(asked)
    for drafts in (1, 2, 4):
        engine = Engine(model, range(2), invariant=True, drafts=drafts, **options)
        assert same(engine.generate(asked), plain)
        assert engine.figures.drafted_tokens > 0


def successors(token: int) -> list[int]:
    """What may follow a token in the language of `speaker`."""
    return [(token * 5 + 1) % 16, (token * 3 + 2) % 16]


@pytest.fixture(scope="module")
def speaker() -> Transformer:
    """A model that has learned a language in which each token has two successors, and its prediction module
    with it."""
    torch.manual_seed(0)
    model = build(replace(TINY, vocab_size=16, initializer_range=0.05), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(160):
        rows = torch.randint(16, (32, 1), generator=generator)
        for _ in range(15):
            turn = torch.rand(32, 1, generator=generator) < 0.8
            rows = torch.cat((rows, torch.where(turn, rows[:, -1:] * 5 + 1, rows[:, -1:] * 3 + 2) % 16), 1)
        output = model(rows, mtp=True)
        losses = next_token_losses(model, output, rows, torch.ones_like(rows, dtype=torch.bool))
        ((losses.main + losses.mtp[0]) / rows.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_trained_module_s_drafts_are_accepted_and_save_steps(speaker):
    asked = [Request((i,), Sampling(24, temperature=0.0)) for i in range(16)]
    plain, drafting = Engine(speaker, []), Engine(speaker, [], drafts=1)
    assert [a.tokens for a in plain.generate(asked)] == [a.tokens for a in drafting.generate(asked)]
    assert drafting.figures.acceptance > 0.8
    assert drafting.figures.steps < 0.65 * plain.figures.steps
    longer = Engine(speaker, [], drafts=3)
    longer.generate(asked)
    assert longer.figures.steps < 0.9 * drafting.figures.steps


def test_sampling_with_drafts_keeps_the_model_s_distribution(speaker):
    """Three tokens after one prompt, many seeds: as often as the model's own probabilities say."""
    count, rules = 4000, Sampling(max_tokens=3, temperature=0.7, top_k=2)
    engine = Engine(speaker, [], drafts=2, max_rows=512)
    answers = engine.generate([Request((3, 0), replace(rules, seed=seed)) for seed in range(count)])
    # The first two tokens of an answer come with drafts for what follows them.
    assert 0.3 < engine.figures.acceptance < 1
    seen: dict[tuple[int, ...], int] = {}
    for answer in answers:
        seen[tuple(answer.tokens)] = seen.get(tuple(answer.tokens), 0) + 1
    chosen: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            grown = {}
            for sequence, share in chosen.items():
                logits = speaker.logits(speaker(torch.tensor([[3, 0, *sequence]])).states_BTD[0][:, -1])[0]
                best = logits.topk(2)
                for token, p in zip(
                    best.indices.tolist(), (best.values / 0.7).softmax(-1).tolist(), strict=True
                ):
                    grown[(*sequence, token)] = share * p
            chosen = grown
    assert set(seen) <= set(chosen)
    cells = {sequence: count * share for sequence, share in chosen.items() if count * share > 5}
    statistic = sum((seen.get(s, 0) - e) ** 2 / e for s, e in cells.items())
    # Eight sequences: a chi-square of 7 degrees of freedom exceeds 24.3 once in a thousand times.
    assert len(cells) > 4
    assert statistic < 24.3


def test_sampled_drafts_are_drawn_with_the_request_s_own_numbers(speaker):
    """With other numbers equal distributions would agree as often as two draws from one: in about 2 of 3."""
    asked = [Request((i,), Sampling(30, seed=i)) for i in range(16)]
    engine = Engine(speaker, [], drafts=1)
    answers = engine.generate(asked)
    assert engine.figures.acceptance > 0.85
    follows = [
        second in successors(first)
        for request, answer in zip(asked, answers, strict=True)
        for first, second in itertools.pairwise([*request.prompt, *answer.tokens])
    ]
    assert sum(follows) > 0.95 * len(follows)


def test_drafts_are_as_good_after_pages_that_were_reused(speaker):
    """What the prediction module caches of shared pages is there too, with nothing missing between."""
    prompt = [1]
    for _ in range(35):
        prompt.append(successors(prompt[-1])[0])
    asked = [Request(tuple(prompt[:n]), Sampling(20, seed=n, temperature=1.0)) for n in (32, 33, 36)]
    fresh = []
    for request in asked:
        engine = Engine(speaker, [], context=64, drafts=2, invariant=True)
        engine.generate([request])
        fresh.append((engine.figures.drafted_tokens, engine.figures.accepted_tokens))
    engine = Engine(speaker, [], context=64, drafts=2, invariant=True)
    engine.generate(asked)
    for request, expected in zip(asked, fresh, strict=True):
        before = engine.figures.drafted_tokens, engine.figures.accepted_tokens
        engine.generate([request])
        found = engine.figures.drafted_tokens - before[0], engine.figures.accepted_tokens - before[1]
        assert found == expected
    assert engine.figures.reused_tokens > 3 * 30


def test_a_large_vocabulary_s_log_probabilities_have_the_same_bits_on_several_threads():
    """Over so many columns torch shares one row's sum among threads, by how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = tiny(vocab_size=50_000, num_hidden_layers=1)
        asked = requests(6, 9, 50_000, max_tokens=4)
        alone = [Engine(model, [], invariant=True).generate([request])[0] for request in asked]
        assert same(Engine(model, [], invariant=True).generate(asked), alone)
    finally:
        torch.set_num_threads(threads)
