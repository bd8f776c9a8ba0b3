"""Random numbers and the choice of a token."""

import math

import pytest
import torch
from torch import Tensor

from model.engine.sampling import Rules, Sampling, choose, uniforms


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Standard deviations that the statistic lies above its mean; about normal for many cells."""
    cells = expected > 0
    freedom = int(cells.sum()) - 1
    statistic = float(((counts - expected)[cells].square() / expected[cells]).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


def pick(logits: Tensor, draws: Tensor, **rules) -> Tensor:
    """What rules choose from one distribution [1, O] at each of the draws [n]."""
    n = len(draws)
    return choose(logits.expand(n, -1), Rules.of([Sampling(**rules)] * n), draws)


@pytest.mark.parametrize("along", ["seeds", "positions", "both"])
def test_draws_are_uniform_along_seeds_and_positions(along):
    n = 1 << 16
    ramp, zero = torch.arange(n), torch.zeros(n, dtype=torch.long)
    seeds, positions = {"seeds": (ramp, zero), "positions": (zero, ramp), "both": (ramp // 256, ramp % 256)}[
        along
    ]
    draws = uniforms(seeds, positions)
    assert draws.dtype == torch.float64
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert len(draws.unique()) == n
    assert abs(chi_square(torch.histc(draws, 256, 0, 1), torch.full((256,), n / 256))) < 4
    # Pairs of neighbours fill the square evenly: a draw says nothing about the next.
    pairs = (draws[:-1] * 16).long() * 16 + (draws[1:] * 16).long()
    assert abs(chi_square(pairs.bincount(minlength=256).double(), torch.full((256,), (n - 1) / 256))) < 4


def test_draws_are_a_function_of_seed_and_position():
    seeds, positions = torch.tensor([7, 7, 8, -(2**63), 2**63 - 1]), torch.tensor([3, 4, 3, 0, 0])
    assert torch.equal(uniforms(seeds, positions), uniforms(seeds, positions))
    assert torch.equal(uniforms(seeds.flip(0), positions.flip(0)).flip(0), uniforms(seeds, positions))
    assert len(uniforms(seeds, positions).unique()) == 5


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_tokens_come_with_their_probabilities(temperature):
    n = 40_000
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 1.5
    draws = uniforms(torch.arange(n), torch.zeros(n, dtype=torch.long))
    picked = pick(logits, draws, temperature=temperature)
    expected = (logits[0].double() / temperature).softmax(-1) * n
    assert chi_square(picked.bincount(minlength=50).double(), expected) < 4


def test_top_p_keeps_the_smallest_set_that_reaches_it_renormalised():
    probs = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    n = 20_000
    draws = uniforms(torch.arange(n), torch.ones(n, dtype=torch.long))
    for top_p, kept in ((0.69, [1, 3]), (0.71, [1, 2, 3]), (0.4, [1]), (1e-9, [1]), (0.96, [0, 1, 2, 3, 4])):
        picked = pick(probs.log()[None], draws, top_p=top_p).bincount(minlength=5).double()
        expected = torch.zeros(5).double()
        expected[kept] = (probs[kept] / probs[kept].sum() * n).double()
        assert not picked[expected == 0].any(), top_p
        if len(kept) > 1:
            assert chi_square(picked, expected) < 4, top_p


def test_a_tiny_temperature_takes_the_best_token():
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1)) * 50
    picked = pick(logits, torch.linspace(0, 0.999, 7).double(), temperature=1e-300)
    assert set(picked.tolist()) == {int(logits.argmax())}


def shares(picked: Tensor, cells: int) -> list[float]:
    return (picked.bincount(minlength=cells) / len(picked)).tolist()


def test_top_k_and_min_p_keep_what_they_say_renormalised():
    probs = torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]])
    draws = (torch.arange(20_000).double() + 0.5) / 20_000
    for rules, kept in (
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.3}, [1, 2, 3]),
        ({"min_p": 1.0}, [1]),
        # Of the three that top_k keeps, with 0.85 of the mass, the two largest hold 0.82.
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
        ({"top_k": 3, "top_p": 0.85}, [1, 2, 3]),
    ):
        expected = torch.zeros(5)
        expected[kept] = probs[0, kept] / probs[0, kept].sum()
        assert shares(pick(probs.log(), draws, **rules), 5) == pytest.approx(expected.tolist(), abs=2e-4), (
            rules
        )


def test_each_row_has_its_own_rules():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 40, generator=generator)
    draws = torch.rand(6, generator=generator).double()
    rules = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.5, top_k=3),
        Sampling(),
        Sampling(top_p=0.3),
        Sampling(temperature=2.0, min_p=0.4),
        Sampling(temperature=0.0, top_k=5),
    ]
    together = choose(logits, Rules.of(rules), draws)
    alone = [choose(logits[i : i + 1], Rules.of(rules[i : i + 1]), draws[i : i + 1]) for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]


def test_the_ends_of_the_interval_choose_tokens_that_can_be_chosen():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    last = 1 - 2.0**-53
    ends = [(p, d) for p in (1.0, 0.9) for d in (0.0, last)]
    picked = [int(pick(logits, torch.tensor([d], dtype=torch.float64), top_p=p)) for p, d in ends]
    assert picked == [1, 3, 1, 3]


def test_temperature_zero_is_greedy():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    rules = Rules.of([Sampling(temperature=0.0)] * 6)
    assert torch.equal(choose(logits, rules, torch.rand(6).double()), logits.argmax(-1))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop": ("a", "")}, "stop"),
        ({"seed": 1 << 63}, "seed"),
    ],
)
def test_settings_out_of_bounds_are_named(arguments, field):
    with pytest.raises(ValueError, match=rf"sampling\.{field}"):
        Sampling(**arguments)
