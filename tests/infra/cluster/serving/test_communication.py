"""Seconds of the all-to-alls, against what DeepEP publishes of its kernels on H800."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import pytest

from infra.cluster.machines import MACHINES
from infra.cluster.network.all_to_all import all_to_all
from infra.cluster.network.gate_reach import gate_reach
from infra.cluster.serving.communication import attention_group, node_limited, point_to_point
from infra.cluster.serving.deployment import Deployment
from model.config import ModelConfig
from tests.infra.cluster.serving.h800 import H800
from tests.infra.cluster.serving.units import PREFILL_PRODUCTION, PREFILL_REPORT

V3 = ModelConfig()

# DeepEP's table of low-latency kernels: 128 tokens, hidden 7168, 8 experts; GPUs, microseconds.
DEEPEP = [(64, 173, 314), (128, 192, 369), (256, 194, 360)]


@pytest.mark.parametrize(("gpus", "dispatch", "combine"), DEEPEP)
def test_point_to_point_as_measured(gpus: int, dispatch: float, combine: float) -> None:
    """Where nearly all tokens leave the node; the smaller tests partly stay inside, still a ninth of 64."""
    unit = Deployment("measured", gpus, tensor_parallel=1, slots_per_gpu=256 // gpus)
    sent = point_to_point(V3, H800, unit, 128)
    assert sent.dispatch * 1e6 == pytest.approx(dispatch, rel=0.1)
    assert sent.combine * 1e6 == pytest.approx(combine, rel=0.17)


def test_one_gpu_sends_nothing() -> None:
    alone = Deployment("alone", 1, tensor_parallel=1, slots_per_gpu=256)
    assert point_to_point(V3, H800, alone, 128).dispatch == 0.0


def test_one_nvlink_domain_leaves_the_network_alone() -> None:
    rack = Deployment("rack", 72, tensor_parallel=1, slots_per_gpu=4)
    values = 128 * 8 * 7168 * 71 / 72
    expected = 3.33e-6 + values * 33 / 32 / 726e9
    assert point_to_point(V3, MACHINES["gb200-nvl72"], rack, 128).dispatch == pytest.approx(expected)
    assert node_limited(V3, MACHINES["gb200-nvl72"], rack, 128).dispatch == pytest.approx(expected)


def test_node_limited_crosses_once_a_node() -> None:
    """Four nodes of two groups each, of which a token is kept to four: it reaches 3.1 nodes."""
    sent = node_limited(V3, H800, PREFILL_PRODUCTION, 4096)
    # A node is left out where both of its groups are, in 6 choose 4 of 8 choose 4 cases.
    reached = 4 * (1 - comb(6, 4) / comb(8, 4))
    expected = 4096 * 7392 * reached * 3 / 4 / 40e9
    assert sent.dispatch - 7.03e-6 == pytest.approx(expected, rel=0.02)
    assert sent.combine - 7.03e-6 == pytest.approx(2 * 32 / 33 * (sent.dispatch - 7.03e-6))
    # 13 experts a token cost no more than 8 at the report's ratio of the two links (50 to 160, §3.2.2).
    assert sent.dispatch > 4096 * 7392 * 8 * 7 / 8 / 160e9


def test_node_limited_is_the_all_to_all_of_training() -> None:
    """The same tokens on the same GPUs: a unit of 64 without spare copies."""
    unit = Deployment("EP64", 64, tensor_parallel=1, slots_per_gpu=4)
    sent = node_limited(V3, H800, unit, 4096)
    trained = all_to_all(V3, 4096, 64, H800, where=gate_reach(V3, 64, 8))
    assert sent.dispatch == pytest.approx(trained.dispatch.seconds)
    assert sent.combine == pytest.approx(trained.combine.seconds)


def test_a_gpu_without_fp8_sends_in_bf16() -> None:
    sent = point_to_point(V3, replace(H800, fp8=0), PREFILL_PRODUCTION, 128)
    assert sent.dispatch == sent.combine == point_to_point(V3, H800, PREFILL_PRODUCTION, 128).combine


def test_imbalance_lengthens_what_the_busiest_gpu_receives() -> None:
    even = node_limited(V3, H800, PREFILL_PRODUCTION, 4096)
    uneven = node_limited(V3, H800, PREFILL_PRODUCTION, 4096, imbalance=1.5)
    assert uneven.dispatch - 7.03e-6 == pytest.approx(1.5 * (even.dispatch - 7.03e-6))


def test_an_attention_group_exchanges_latents_and_outputs() -> None:
    assert attention_group(V3, H800, PREFILL_PRODUCTION, 100) == 0.0
    values = 100 * 3 * (1536 + 512 + 64 + 7168)
    expected = 2 * 3.33e-6 + values * 2 / 160e9
    assert attention_group(V3, H800, PREFILL_REPORT, 100) == pytest.approx(expected)
