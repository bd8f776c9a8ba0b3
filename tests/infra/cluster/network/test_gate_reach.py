"""Where a gate sends tokens, against the model's own gate and a slow rule on the same scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.network import gate_reach as module
from infra.cluster.network.all_to_all import reach
from infra.cluster.network.gate_reach import SAMPLES, gate_reach
from model.config import ModelConfig
from model.gate import Gate
from tests.model.tiny import TINY

SHAPES = {
    "report": (DEEPSEEK_V3, 64, 8),
    "two groups a node": (DEEPSEEK_V3, 32, 8),
    "uneven": (DEEPSEEK_V3, 48, 8),
    "half a group a node": (replace(DEEPSEEK_V3, n_group=4, topk_group=2), 64, 8),
    "tiny": (replace(DEEPSEEK_V3, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2), 4, 2),
    "one expert a group": (
        replace(DEEPSEEK_V3, n_routed_experts=8, num_experts_per_tok=2, n_group=8, topk_group=3),
        8,
        2,
    ),
    "free": (replace(DEEPSEEK_V3, n_group=1, topk_group=1), 64, 8),
}


def slowly(scores: np.ndarray, groups: int, kept: int, chosen: int) -> list[set[int]]:
    """The experts of each token, one at a time: groups by their two best together, then the best in those."""
    found = []
    for token in scores:
        members = np.split(np.arange(len(token)), groups)
        worth = [sum(sorted(token[group], reverse=True)[:2]) for group in members]
        best = sorted(range(groups), key=lambda group: -worth[group])[:kept]
        allowed = [expert for group in best for expert in members[group]]
        found.append(set(sorted(allowed, key=lambda expert: -token[expert])[:chosen]))
    return found


@pytest.mark.parametrize(("shape", "gpus", "node"), SHAPES.values(), ids=SHAPES)
def test_counts_are_those_of_the_models_gate_and_of_a_slow_rule(shape, gpus, node, monkeypatch):
    tokens, experts = 300, shape.n_routed_experts
    monkeypatch.setattr(module, "SAMPLES", tokens)
    module._sampled.cache_clear()
    found = gate_reach(shape, gpus, node)
    module._sampled.cache_clear()

    scores = np.random.default_rng(0).random((tokens, experts))
    names = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    sizes = {name: getattr(shape, name) for name in names}
    picked = Gate(ModelConfig(**TINY.to_dict() | sizes)).select(torch.from_numpy(scores))
    chosen = slowly(scores, shape.n_group, shape.topk_group, shape.num_experts_per_tok)
    assert [set(row) for row in picked.tolist()] == chosen

    for parts, share in ((found.nodes, found.node), (gpus, found.gpu)):
        # Runs of experts as equal as whole experts allow: from each share's first whole expert.
        runs = np.split(np.arange(experts), [-(-part * experts // parts) for part in range(1, parts)])
        assert max(map(len, runs)) - min(map(len, runs)) == (experts % parts > 0)
        owner = {expert: part for part, run in enumerate(runs) for expert in run.tolist()}
        met = [len({owner[expert] for expert in token}) for token in chosen]
        assert share == pytest.approx(sum(met) / tokens / parts)


def test_the_reports_gate_reaches_nearly_all_of_its_four_nodes():
    found = gate_reach(DEEPSEEK_V3, 64, 8)
    assert found.nodes_reached == pytest.approx(3.95, abs=0.01)
    assert found.nodes_reached <= DEEPSEEK_V3.topk_group
    uniform = reach(DEEPSEEK_V3, 64, 8)
    assert (found.nodes, found.gpus_per_node) == (uniform.nodes, uniform.gpus_per_node) == (8, 8)
    assert found.network_copies / uniform.network_copies == pytest.approx(1.09, abs=0.01)


def test_without_groups_it_is_uniform_routing():
    """Exact where the gate is free: off by the sample's error alone."""
    free = replace(DEEPSEEK_V3, n_group=1, topk_group=1)
    found, exact = gate_reach(free, 64, 8), reach(free, 64, 8)
    for name in ("node", "gpu"):
        spread = (getattr(exact, name) / SAMPLES) ** 0.5
        assert getattr(found, name) == pytest.approx(getattr(exact, name), abs=4 * spread)


def test_the_same_tokens_every_time():
    first = gate_reach(DEEPSEEK_V3, 64, 8)
    module._sampled.cache_clear()
    assert gate_reach(DEEPSEEK_V3, 64, 8) == first
