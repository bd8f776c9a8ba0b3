"""Bytes of a serving GPU, against the published cache of a token and counts of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.cluster.counts.accounting import parameters
from infra.cluster.counts.weights import Part
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.memory import serving_memory, weight_bytes
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.serving.h800 import H800
from tests.infra.cluster.serving.units import DECODE_PRODUCTION, DECODE_REPORT

V3 = ModelConfig()


def test_one_gpu_that_holds_all() -> None:
    """671.03B weights in FP8, and one byte more for those in BF16 (norms are counted nowhere)."""
    alone = Deployment("alone", 1, tensor_parallel=1, slots_per_gpu=256)
    counted = parameters(V3)
    kv_b = 61 * 512 * 128 * 256
    twice = kv_b + sum(counted.parts[p].total for p in (Part.ROUTER, Part.EMBEDDING, Part.HEAD))
    assert weight_bytes(V3, alone) == pytest.approx(counted.total + twice, rel=1e-5)


def test_a_decode_gpu_of_the_report_has_one_expert_a_layer() -> None:
    """58 experts of 44.04M, dense networks of 1.19B, a quarter of heads, output head and embedding."""
    down, kv_b, attention = 61 * 7168 * 2112, 61 * 512 * 32768, 61 * 187_107_328
    expected = 58 * 44_040_192 + 3 * 396_361_728 + down + (attention - down - kv_b) / 4
    expected += 2 * (kv_b / 4 + 58 * 7168 * 256 + 2 * 926_679_040 / 4)
    assert weight_bytes(V3, DECODE_REPORT) == pytest.approx(expected, rel=1e-4)


def test_requests_fill_what_is_left() -> None:
    found = serving_memory(V3, H800, DECODE_PRODUCTION, context=4989)
    assert found.cache_per_request == 4989 * 70_272
    assert found.requests * found.cache_per_request <= found.cache
    assert (found.requests + 1) * found.cache_per_request > found.cache
    assert found.weights + found.reserve + found.cache == found.total


def test_a_group_holds_the_cache_of_all_its_requests() -> None:
    grouped = serving_memory(V3, H800, DECODE_REPORT, context=4989)
    assert grouped.cache_per_request == 4 * 4989 * 70_272


def test_what_does_not_fit_is_said() -> None:
    node = Deployment("one node", 8, tensor_parallel=1, slots_per_gpu=32)
    with pytest.raises(ConfigError, match=r"deployment\.gpus is 8: .* GB of weights"):
        serving_memory(V3, H800, node, context=4096)
    larger = replace(H800, memory=141e9)
    assert serving_memory(V3, larger, node, context=4096).requests > 0
