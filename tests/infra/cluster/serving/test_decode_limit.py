"""The communication limit of decoding, against the paper's worked example (ISCA §2.3.2)."""

from __future__ import annotations

import pytest

from infra.cluster.machines import MACHINES
from infra.cluster.serving.decode_limit import (
    PAPER_HIDDEN,
    DecodeLimit,
    beside,
    decode_limit,
)
from infra.cluster.serving.deployment import Deployment
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.serving.h800 import H800
from tests.infra.cluster.serving.units import DECODE_PRODUCTION, DECODE_REPORT

V3 = ModelConfig()


def test_infiniband_as_published() -> None:
    limit = decode_limit(V3, 50e9, hidden=PAPER_HIDDEN)
    assert limit.communication * 1e6 == pytest.approx(120.96, abs=0.005)
    assert limit.layer * 1e6 == pytest.approx(241.92, abs=0.005)
    assert limit.tpot * 1e3 == pytest.approx(14.76, abs=0.005)
    assert int(limit.tokens_per_second) == 67


def test_nvlink_as_published() -> None:
    limit = decode_limit(V3, 900e9, hidden=PAPER_HIDDEN)
    assert limit.communication * 1e6 == pytest.approx(6.72, abs=0.005)
    assert limit.tpot * 1e3 == pytest.approx(0.82, abs=0.005)
    assert limit.tokens_per_second == pytest.approx(1200, rel=0.02)


def test_the_model_s_own_hidden_size() -> None:
    limit = decode_limit(V3, 50e9)
    assert limit.hidden == 7168
    assert limit.communication * 1e6 == pytest.approx(123.86, abs=0.005)


def test_it_scales_with_bytes_and_bandwidth() -> None:
    base = DecodeLimit(tokens=32, experts=9, hidden=7000, layers=61, bandwidth=50e9)
    assert base.bytes == 3 * 32 * 9 * 7000
    assert DecodeLimit(64, 9, 7000, 61, 50e9).tpot == pytest.approx(2 * base.tpot)
    assert DecodeLimit(32, 9, 7000, 61, 100e9).tpot == pytest.approx(base.tpot / 2)


def test_a_limit_needs_positive_numbers() -> None:
    with pytest.raises(ConfigError, match="bandwidth is 0"):
        DecodeLimit(32, 9, 7000, 61, 0)


def test_latency_and_computation_beside_it() -> None:
    """Latency is two messages for each MoE layer and micro-batch; computation does not depend on links."""
    found = beside(V3, H800, DECODE_REPORT, 32, 4096)
    assert found.latency == pytest.approx(2 * 58 * 2 * 3.7e-6)
    # The paper's bytes at the bandwidth that is reached, of 58 of 61 layers, less what stays on the GPU, and
    # the scales of FP8.
    expected = decode_limit(V3, 40e9).tpot * 58 / 61 * 319 / 320 * (33 / 32 + 2) / 3
    assert found.bytes == pytest.approx(expected)
    assert found.hidden < found.exposed == found.communication + found.computation
    rack = Deployment("one rack", gpus=72, tensor_parallel=1, slots_per_gpu=4)
    there = beside(V3, MACHINES["gb200-nvl72"], rack, 32, 4096)
    assert there.latency == pytest.approx(2 * 58 * 2 * 3.33e-6)
    # In one NVLink domain computation binds, over the network the two are of one size.
    assert there.communication < 0.2 * there.computation
    assert 0.3 < beside(V3, H800, DECODE_PRODUCTION, 64, 4096).communication / found.computation < 3
