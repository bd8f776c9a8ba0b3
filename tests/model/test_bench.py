"""What `model.bench` calls a limit counts the operations that a step does, and its step trains."""

import pytest
import torch

from infra.cluster.counts.accounting import forward_operations
from model.bench.setting import CONFIG, in_turns
from model.bench.training import limit_seconds, our_step, products
from model.transformer import build
from tests.model.tiny import TINY, tokens


@pytest.mark.parametrize("config", [CONFIG, TINY], ids=["bench", "tiny"])
def test_the_products_are_all_the_operations_but_attentions_own(config):
    length, rows = 32, 6
    counted = 3 * 2.0 * sum(n * m * k * o for n, m, k, o in products(config, rows * length))
    work = forward_operations(config, length)
    expected = 3 * (work.total - work.attention_core)
    assert counted == pytest.approx(expected * rows * length, rel=1e-2)


def test_a_limit_is_a_time():
    assert 0 < limit_seconds(TINY, 2, 16, torch.float32) < 5


def test_the_step_of_the_bench_learns():
    before = torch.get_num_threads()
    batch = {"tokens": tokens(8, 16), "segments": torch.zeros(8, 16), "loss": torch.ones(8, 16)}
    step = our_step(build(TINY, 0), batch, lanes=2)
    losses = [step() for _ in range(6)]
    assert losses[-1] < losses[0]
    torch.set_num_threads(before)


def test_peers_run_in_turns():
    calls: list[str] = []
    taken = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert set(taken) == {"a", "b"}
