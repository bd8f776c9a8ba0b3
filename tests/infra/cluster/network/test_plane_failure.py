"""Failed planes: byte counts against tokens that are walked one by one, and the single-plane tree."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from infra.cluster.network.all_to_all import all_to_all
from infra.cluster.network.gate_reach import gate_reach
from infra.cluster.network.plane_failure import lost_planes, lost_spines
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.h800_network import NETWORK, NOMINAL, NVLINK, nodes_of

V3 = ModelConfig()


def test_nothing_failed_is_the_plain_all_to_all():
    plain = all_to_all(V3, 4096, 64, NOMINAL).dispatch
    for degraded in (lost_planes(V3, 4096, 64, NOMINAL, 0), lost_spines(V3, 4096, 64, NOMINAL, 0)):
        assert degraded.network_seconds == pytest.approx(plain.network_seconds)
        assert degraded.nvlink_seconds == pytest.approx(plain.nvlink_seconds)
        assert degraded.slow_down == pytest.approx(1)
        assert degraded.bandwidth == NETWORK


@pytest.mark.parametrize("failed", [1, 4, 7])
def test_v3_slows_down_by_the_bandwidth_lost_while_nvlink_has_room(failed):
    planes = lost_planes(V3, 4096, 64, NOMINAL, failed)
    spines = lost_spines(V3, 4096, 64, NOMINAL, failed)
    assert planes.bandwidth == spines.bandwidth == NETWORK * (8 - failed) / 8
    assert planes.network_seconds == pytest.approx(spines.network_seconds)
    assert planes.slow_down >= spines.slow_down - 1e-12
    assert spines.slow_down == pytest.approx(8 / (8 - failed))
    assert (planes.own_port, spines.own_port) == ((8 - failed) / 8, 1.0)
    assert planes.nvlink_seconds > spines.nvlink_seconds


def test_the_gates_reach_is_taken_where_it_is_given():
    where = gate_reach(V3, 64, 8)
    plain = all_to_all(V3, 4096, 64, NOMINAL, where=where).dispatch
    for lost in (lost_planes, lost_spines):
        whole, degraded = (lost(V3, 4096, 64, NOMINAL, failed, where=where) for failed in (0, 2))
        assert whole.network_seconds == pytest.approx(plain.network_seconds)
        assert whole.nvlink_seconds == pytest.approx(plain.nvlink_seconds)
        assert degraded.network_seconds > lost(V3, 4096, 64, NOMINAL, 2).network_seconds


def test_planes_are_those_of_the_gpus_that_take_part():
    """128 of the GPUs of two domains of 72: one plane for each of 64."""
    assert lost_planes(V3, 4096, 128, nodes_of(72), 1).parts == 64


def test_one_plane_of_eight_costs_a_seventh():
    assert lost_planes(V3, 4096, 64, NOMINAL, 1).slow_down == pytest.approx(8 / 7)


def test_a_slow_nvlink_becomes_the_bound():
    slow = replace(NOMINAL, nvlink=NETWORK * 1.5)
    degraded = lost_planes(V3, 4096, 64, slow, 1)
    assert degraded.seconds == degraded.nvlink_seconds > degraded.network_seconds
    assert degraded.slow_down > lost_spines(V3, 4096, 64, slow, 1).slow_down


@pytest.mark.parametrize("failed", [1, 2, 3])
def test_bytes_are_those_of_walked_tokens(failed):
    """Four planes, four nodes, 32 experts: every token handed over, sent and forwarded by the rules."""
    planes, nodes, tokens = 4, 4, 3000
    shape = replace(V3, n_routed_experts=32, n_group=4, topk_group=2, num_experts_per_tok=4, hidden_size=1)
    generator = np.random.default_rng(failed)
    survivors = list(range(failed, planes))
    network, sent, received = Counter(), Counter(), Counter()

    def nvlink(node: int, one: int, other: int) -> None:
        if one != other:
            sent[one] += 1
            received[other] += 1

    for source in range(planes * nodes):
        home, index = divmod(source, planes)
        for _ in range(tokens):
            groups = generator.choice(4, 2, replace=False)
            picked = generator.choice(16, 4, replace=False)
            targets = {int(groups[p // 8] * 8 + p % 8) // 2 for p in picked}
            for node in {gpu // planes for gpu in targets}:
                arrives = index
                if node != home:
                    arrives = index if index >= failed else int(generator.choice(survivors))
                    nvlink(home, index, arrives)
                    network[arrives] += 1
                for gpu in targets:
                    if gpu // planes == node:
                        nvlink(node, arrives, gpu % planes)
    degraded = lost_planes(shape, tokens, 16, nodes_of(planes), failed, value_bytes=1.0)
    # Counters add up the four nodes.
    assert degraded.network_seconds * NETWORK == pytest.approx(max(network.values()) / nodes, rel=0.02)
    busiest = max(*sent.values(), *received.values()) / nodes
    assert degraded.nvlink_seconds * NVLINK == pytest.approx(busiest, rel=0.02)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="0 to 7"):
        lost_planes(V3, 4096, 64, NOMINAL, 8)
    with pytest.raises(ConfigError, match="0 to 7"):
        lost_spines(V3, 4096, 64, NOMINAL, -1)
    with pytest.raises(ConfigError, match="16 does"):
        lost_planes(V3, 4096, 8, NOMINAL)
    with pytest.raises(ConfigError, match="tokens"):
        lost_planes(V3, 0, 64, NOMINAL)
