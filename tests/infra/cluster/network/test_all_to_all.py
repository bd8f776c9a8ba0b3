"""Dispatch and combine: exact counts against enumeration and sampling, the report's worked figures."""

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cluster.machines import MACHINES
from infra.cluster.network.all_to_all import Reach, all_to_all, experts_at_no_cost, reach, value_bytes
from infra.cluster.network.even_split import even_split
from infra.cluster.network.gate_reach import gate_reach
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.h800_network import NETWORK, NOMINAL, NVLINK, nodes_of

V3 = ModelConfig()


def shape(experts: int, groups: int, chosen: int, picked: int) -> ModelConfig:
    return replace(
        V3, n_routed_experts=experts, n_group=groups, topk_group=chosen, num_experts_per_tok=picked
    )


def all_picks(experts: int, groups: int, chosen: int, picked: int):
    """Every way to draw groups and then experts; all are equally probable."""
    size = experts // groups
    for some in combinations(range(groups), chosen):
        yield from combinations([g * size + i for g in some for i in range(size)], picked)


def copies(pick, experts: int, gpus: int, in_node: int, source: int) -> tuple[int, int, int, int]:
    """(nodes, GPUs, sends over the network, sends over NVLink) of one token, by walking its way."""
    targets = {expert * gpus // experts for expert in pick}
    nodes = {gpu // in_node for gpu in targets}
    network = nvlink = 0
    for node in nodes:
        lands = node * in_node + source % in_node
        network += node != source // in_node
        nvlink += sum(gpu != lands for gpu in targets if gpu // in_node == node)
    return len(nodes), len(targets), network, nvlink


def means(where: Reach) -> list[float]:
    return [where.nodes_reached, where.gpus_reached, where.network_copies, where.nvlink_copies]


@pytest.mark.parametrize(
    ("experts", "groups", "chosen", "picked", "gpus", "in_node"),
    [
        pytest.param(12, 3, 2, 3, 6, 2, id="a group is a node"),
        pytest.param(12, 3, 2, 3, 12, 4, id="an expert a GPU"),
        pytest.param(12, 6, 3, 4, 6, 3, id="three groups a node"),
        pytest.param(12, 6, 3, 4, 3, 1, id="two groups a GPU"),
        pytest.param(12, 2, 1, 3, 12, 3, id="a group over two nodes"),
        pytest.param(12, 4, 4, 3, 6, 2, id="no limit"),
        pytest.param(12, 4, 2, 3, 4, 8, id="within a node"),
        pytest.param(12, 3, 2, 3, 12, 1, id="a quarter of a group a node"),
        pytest.param(12, 4, 2, 3, 6, 3, id="runs across groups"),
        pytest.param(12, 3, 1, 3, 2, 1, id="a group and a half a node"),
        pytest.param(12, 3, 2, 3, 6, 4, id="nodes that are not filled"),
    ],
)
def test_counts_are_those_of_every_possible_token(experts, groups, chosen, picked, gpus, in_node):
    picks = list(all_picks(experts, groups, chosen, picked))
    in_node = next(n for n in range(min(in_node, gpus), 0, -1) if gpus % n == 0)
    walked = np.mean([copies(pick, experts, gpus, in_node, s) for pick in picks for s in range(gpus)], axis=0)
    where = reach(shape(experts, groups, chosen, picked), gpus, in_node)
    np.testing.assert_allclose(means(where), walked, rtol=1e-12)


def test_without_the_limit_any_experts_are_drawn():
    picks = list(combinations(range(12), 3))
    walked = np.mean([copies(pick, 12, 6, 2, s) for pick in picks for s in range(6)], axis=0)
    where = reach(shape(12, 3, 2, 3), 6, 2, node_limited=False)
    np.testing.assert_allclose(means(where), walked, rtol=1e-12)


@pytest.mark.parametrize("expert_parallel", [32, 64, 128])
def test_counts_of_v3_are_those_of_drawn_tokens(expert_parallel):
    generator = np.random.default_rng(0)
    walked = []
    for _ in range(4000):
        some = generator.choice(8, 4, replace=False)
        pick = generator.choice(128, 8, replace=False)
        experts = some[pick // 32] * 32 + pick % 32
        walked.append(
            copies(experts.tolist(), 256, expert_parallel, 8, int(generator.integers(expert_parallel)))
        )
    error = np.std(walked, axis=0) / len(walked) ** 0.5
    assert np.all(np.abs(np.mean(walked, axis=0) - means(reach(V3, expert_parallel, 8))) < 4 * error)


def test_a_gate_reaches_more_nodes_than_uniform_draws_do():
    """The published rule on independent affinities: four groups by their top two, then eight experts."""
    affinity = np.random.default_rng(1).random((20000, 8, 32))
    best = np.argsort(np.sort(affinity, axis=-1)[..., -2:].sum(-1), axis=-1)[:, -4:]
    kept = np.full_like(affinity, -1.0)
    rows = np.arange(len(affinity))[:, None]
    kept[rows, best] = affinity[rows, best]
    chosen = np.argsort(kept.reshape(-1, 256), axis=-1)[:, -8:]
    nodes = np.mean([len(set(row)) for row in (chosen // 32).tolist()])
    assert nodes == pytest.approx(3.95, abs=0.01)
    assert nodes / reach(V3, 64, 8).nodes_reached == pytest.approx(1.09, abs=0.005)


def test_v3_worked_by_hand():
    cost = all_to_all(V3, 4096, 64, NOMINAL)
    node = (1 - comb(96, 8) / comb(128, 8)) / 2
    gpu = (1 - comb(124, 8) / comb(128, 8)) / 2
    assert cost.reach.nodes_reached == pytest.approx(8 * node) == pytest.approx(3.629, abs=5e-4)
    assert cost.reach.network_copies == pytest.approx(7 * node)
    assert cost.dispatch.network_bytes == pytest.approx(4096 * (7168 + 56 * 4) * 7 * node)
    assert cost.combine.network_bytes == pytest.approx(4096 * 7168 * 2 * 7 * node)
    assert cost.dispatch.nvlink_bytes == pytest.approx(4096 * (7168 + 56 * 4) * 8 * 7 * gpu)
    assert cost.dispatch.network_seconds == pytest.approx(cost.dispatch.network_bytes / NETWORK)
    assert cost.dispatch.nvlink_seconds == pytest.approx(cost.dispatch.nvlink_bytes / NVLINK)
    assert cost.dispatch.bound_by == "network"
    assert cost.dispatch.seconds == pytest.approx(cost.dispatch.network_seconds + 3.7e-6 + 3.33e-6)
    assert cost.backward_seconds == cost.forward_seconds == cost.dispatch.seconds + cost.combine.seconds
    one_way = cost.dispatch.network_bytes + cost.combine.network_bytes
    assert cost.network_bytes == pytest.approx(2 * one_way)


def test_half_a_group_a_node_reaches_up_to_twice_the_nodes():
    """EP128 on nodes of eight: 16 nodes for 8 groups, so four groups lie on eight nodes."""
    exact, gate = reach(V3, 128, 8), gate_reach(V3, 128, 8)
    assert exact.nodes == gate.nodes == 16
    # Every one of the eight experts in another of the 8 nodes of its groups, at most.
    assert 4 < exact.nodes_reached < gate.nodes_reached < 8
    assert exact.nodes_reached == pytest.approx(8 * (1 - comb(112, 8) / comb(128, 8)))


def test_a_domain_that_is_not_filled_keeps_all_to_itself():
    """EP64 on the 72 GPUs of an NVL72: nothing crosses the network."""
    rack = all_to_all(V3, 4096, 64, MACHINES["gb200-nvl72"])
    assert rack.network_bytes == 0
    assert (rack.reach.nodes, rack.reach.gpus_per_node) == (1, 64)
    halves = reach(V3, 128, 72)
    assert (halves.nodes, halves.gpus_per_node) == (2, 64)


@pytest.mark.parametrize(("expert_parallel", "in_node"), [(32, 8), (64, 8), (64, 72), (128, 8)])
def test_without_the_limit_a_gate_is_uniform(expert_parallel, in_node):
    exact = reach(V3, expert_parallel, in_node, node_limited=False)
    sampled = gate_reach(V3, expert_parallel, in_node, node_limited=False)
    assert means(sampled) == pytest.approx(means(exact), rel=0.01)


def test_a_gate_over_gpus_that_do_not_divide_the_experts():
    """18 nodes of 8: each GPU one or two of 256 experts. A token reaches no more than it has experts."""
    where = gate_reach(V3, 144, 8)
    assert (where.nodes, where.gpus_per_node) == (18, 8)
    assert 4 < where.nodes_reached <= where.gpus_reached <= 8


@given(ranks=st.integers(1, 400), most=st.integers(1, 80))
def test_ranks_lie_in_equal_parts_on_few_nodes(ranks, most):
    nodes, each = even_split(ranks, most)
    assert nodes * each == ranks
    assert each <= most
    assert not any(ranks % other == 0 and ranks // other <= most for other in range(1, nodes))


@pytest.mark.parametrize(
    ("precision", "there", "back"), [("fp8", 33 / 32, 2), ("bf16", 2, 2), ("fp32", 4, 4)]
)
def test_bytes_follow_the_precision(precision, there, back):
    assert value_bytes(precision) == (there, back)


def test_the_limit_saves_network_traffic():
    limited, free = (all_to_all(V3, 4096, 64, NOMINAL, node_limited=on) for on in (True, False))
    assert free.reach.nodes_reached == pytest.approx(8 * (1 - comb(224, 8) / comb(256, 8)))
    assert free.dispatch.network_bytes / limited.dispatch.network_bytes == pytest.approx(
        5.2947 / 3.6290, rel=1e-4
    )
    assert free.reach.gpus_reached == pytest.approx(limited.reach.gpus_reached, rel=0.05)


def test_thirteen_experts_cost_the_network_of_four_nodes():
    assert experts_at_no_cost(V3, NOMINAL) / 4 == pytest.approx(3.2)
    assert round(experts_at_no_cost(V3, NOMINAL)) == 13
    # By what a port really sends it is more.
    assert experts_at_no_cost(V3, MACHINES["h800"]) == 16
    eight, thirteen = (
        all_to_all(replace(V3, num_experts_per_tok=picked), 4096, 64, NOMINAL).dispatch for picked in (8, 13)
    )
    assert eight.bound_by == thirteen.bound_by == "network"
    # Only that the four nodes are reached more surely, never a fifth.
    assert thirteen.network_bytes <= 4096 * 7392 * 4 * 7 / 8
    assert thirteen.seconds < eight.seconds * 1.1


def test_within_a_node_only_nvlink_counts():
    cost = all_to_all(V3, 4096, 8, NOMINAL)
    assert cost.network_bytes == 0
    assert cost.dispatch.bound_by == "nvlink"
    assert cost.dispatch.latency == NOMINAL.nvlink_latency
    assert cost.dispatch.seconds == pytest.approx(cost.dispatch.nvlink_bytes / NVLINK + 3.33e-6)
    alone = all_to_all(V3, 4096, 1, NOMINAL)
    assert alone.forward_seconds == alone.nvlink_bytes == 0


def test_one_gpu_nodes_use_the_network_alone():
    cost = all_to_all(V3, 4096, 64, nodes_of(1))
    assert cost.nvlink_bytes == 0
    assert cost.reach.nodes_reached == cost.reach.gpus_reached


@given(
    expert_parallel=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]),
    gpus=st.sampled_from([1, 2, 4, 8, 16]),
    chosen=st.sampled_from([1, 2, 4, 8]),
    picked=st.integers(1, 16),
    tokens=st.integers(1, 10**6),
)
def test_bounds_of_any_layout(expert_parallel, gpus, chosen, picked, tokens):
    routed = shape(256, 8, chosen, picked)
    cost = all_to_all(routed, tokens, expert_parallel, nodes_of(gpus))
    where = cost.reach
    assert 1 - 1e-9 <= where.nodes_reached <= where.gpus_reached + 1e-9
    assert where.gpus_reached <= picked + 1e-9
    # A group lies on nodes / 8 nodes, or several on one.
    assert where.nodes_reached <= chosen * max(1, where.nodes // 8) + 1e-9
    assert cost.dispatch.network_bytes / tokens == pytest.approx(7392 * where.network_copies)
    assert cost.combine.network_bytes * 7392 == pytest.approx(cost.dispatch.network_bytes * 14336)


@pytest.mark.parametrize(
    ("expert_parallel", "message"),
    [(0, "1 fits"), (60, "64 fits"), (300, "256 fits")],
)
def test_gpus_that_do_not_share_the_experts_are_refused(expert_parallel, message):
    with pytest.raises(ConfigError, match=message):
        reach(V3, expert_parallel, 8)


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="tokens is 0"):
        all_to_all(V3, 0, 64, NOMINAL)
    with pytest.raises(ConfigError, match="dispatch_bytes"):
        all_to_all(V3, 1, 64, NOMINAL, dispatch_bytes=float("nan"))
    with pytest.raises(ConfigError, match="probabilities"):
        Reach(8, 8, node=0.2, gpu=0.3)
    with pytest.raises(ConfigError, match="at least 1"):
        Reach(0, 8, node=0.2, gpu=0.1)
