"""Pipeline boundaries, rings and ZeRO-1: by hand, and against rings that are stepped through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cluster.network.collectives import Group, all_gather, boundary, reduce_scatter, zero1
from infra.errors import ConfigError
from tests.infra.cluster.h800_network import NETWORK, NOMINAL, NVLINK, nodes_of


def test_a_pipeline_boundary_by_hand():
    sent = boundary(4096, 7168, NOMINAL)
    assert sent.network_bytes == 4096 * 7168 * 2
    assert sent.seconds == pytest.approx(4096 * 7168 * 2 / 50e9 + 3.7e-6)
    inside = boundary(4096, 7168, NOMINAL, within_node=True)
    assert (inside.network_bytes, inside.nvlink_bytes) == (0, 4096 * 7168 * 2)
    assert inside.seconds == pytest.approx(4096 * 7168 * 2 / 160e9 + 3.33e-6)


def ring(chunks: list[set[int]]) -> tuple[int, int]:
    """Step a ring all-gather until all have all: (steps, chunks that each rank sent)."""
    ranks, passed = len(chunks), [set(one) for one in chunks]
    steps = sent = 0
    while any(chunks[0] != one for one in chunks):
        sent += len(passed[0])
        passed = [passed[rank - 1] for rank in range(ranks)]
        for one, new in zip(chunks, passed, strict=True):
            one |= new
        steps += 1
    return steps, sent


@pytest.mark.parametrize(("nodes", "in_node"), [(1, 8), (4, 1), (4, 8), (3, 2), (1, 1)])
def test_all_gather_is_the_ring_stepped_through(nodes, in_node):
    ranks = nodes * in_node
    held = {(node, index): {node * in_node + index} for node in range(nodes) for index in range(in_node)}
    network = [ring([held[node, index] for node in range(nodes)]) for index in range(in_node)]
    nvlink = [ring([held[node, index] for index in range(in_node)]) for node in range(nodes)]
    assert all(len(one) == ranks for one in held.values())
    done = all_gather(ranks * 1e6, Group(nodes, in_node), NOMINAL)
    steps, sent = network[0]
    assert done.network_bytes == pytest.approx(sent * 1e6)
    assert done.network_seconds == pytest.approx(sent * 1e6 / NETWORK + steps * 3.7e-6)
    steps, sent = nvlink[0]
    assert done.nvlink_bytes == pytest.approx(sent * 1e6)
    assert done.nvlink_seconds == pytest.approx(sent * 1e6 / NVLINK + steps * 3.33e-6)


@given(nodes=st.integers(1, 64), in_node=st.integers(1, 8), size=st.floats(0, 1e12))
def test_every_rank_is_sent_what_it_lacks(nodes, in_node, size):
    group = Group(nodes, in_node)
    done = all_gather(size, group, NOMINAL)
    lacking = size * (group.ranks - 1) / group.ranks
    assert done.network_bytes + done.nvlink_bytes == pytest.approx(lacking, rel=1e-9, abs=1e-9)
    assert reduce_scatter(size, group, NOMINAL) == done


def test_zero1_of_a_stage_of_v3():
    """128 GPUs a stage: the dense part on 16 nodes of 8, experts on two GPUs of different nodes each."""
    done = zero1(700_000_000, 700_000_000, 128, 64, NOMINAL)
    assert (done.dense.group, done.experts.group) == (Group(16, 8), Group(2, 1))
    gradients = 700e6 * 4
    assert done.dense.gradients.network_bytes == pytest.approx(gradients * 15 / 128)
    assert done.dense.gradients.nvlink_bytes == pytest.approx(gradients * 7 / 8)
    assert done.experts.gradients.network_bytes == pytest.approx(gradients / 2)
    assert done.experts.gather.network_bytes == pytest.approx(gradients / 4)
    assert done.experts.gather.nvlink_bytes == 0
    # By its own port each, two copies of an expert take longer than 128 of the dense part.
    assert done.experts.seconds > done.dense.seconds
    assert done.seconds == done.dense.seconds + done.experts.seconds


@pytest.mark.parametrize(
    ("data_parallel", "expert_parallel", "dense", "experts"),
    [
        (8, 8, Group(1, 8), Group(1, 1)),
        (8, 2, Group(1, 8), Group(1, 4)),
        (16, 2, Group(2, 8), Group(2, 4)),
        (4, 1, Group(1, 4), Group(1, 4)),
        (16, 16, Group(2, 8), Group(1, 1)),
        (1, 1, Group(1, 1), Group(1, 1)),
    ],
)
def test_groups_are_those_of_consecutive_ranks(data_parallel, expert_parallel, dense, experts):
    done = zero1(10, 10, data_parallel, expert_parallel, NOMINAL)
    assert (done.dense.group, done.experts.group) == (dense, experts)
    same = np.arange(data_parallel).reshape(-1, expert_parallel)[:, 0]
    nodes, counts = np.unique(same // 8, return_counts=True)
    assert done.experts.group == Group(len(nodes), int(counts[0]))
    assert (done.experts.seconds == 0) == (data_parallel == expert_parallel)


@pytest.mark.parametrize(
    ("gpus", "data_parallel", "expert_parallel", "dense", "experts"),
    [
        (72, 128, 64, Group(2, 64), Group(2, 1)),
        (72, 128, 8, Group(2, 64), Group(2, 8)),
        (72, 64, 8, Group(1, 64), Group(1, 8)),
        (72, 256, 128, Group(4, 64), Group(2, 1)),
        (8, 12, 12, Group(2, 6), Group(1, 1)),
        (8, 24, 3, Group(3, 8), Group(4, 2)),
        (8, 11, 1, Group(11, 1), Group(11, 1)),
    ],
)
def test_groups_that_do_not_fill_nodes_cost_what_leaves_them(
    gpus, data_parallel, expert_parallel, dense, experts
):
    done = zero1(10, 10, data_parallel, expert_parallel, nodes_of(gpus))
    assert (done.dense.group, done.experts.group) == (dense, experts)
    sent = done.dense.gradients.network_bytes
    assert sent == pytest.approx(10 * 4 * (dense.nodes - 1) / data_parallel)
    assert (sent == 0) == (data_parallel <= gpus)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: boundary(0, 7168, NOMINAL), "at least 1"),
        (lambda: boundary(1, 7168, NOMINAL, value_bytes=0), "value_bytes"),
        (lambda: Group(0, 1), "at least 1"),
        (lambda: all_gather(1.0, Group(1, 16), NOMINAL), "8 fits"),
        (lambda: all_gather(float("nan"), Group(1, 8), NOMINAL), "total_bytes"),
        (lambda: zero1(1, 1, 100, 64, NOMINAL), "128 fits"),
        (lambda: zero1(1, 1, 12, 0, NOMINAL), "12 fits"),
        (lambda: zero1(1, 1, 8, 8, NOMINAL, gradient_bytes=-1), "gradient_bytes"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
