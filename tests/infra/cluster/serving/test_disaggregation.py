"""Sizing of prefill and decode units: balances that must hold, and figures from production."""

from __future__ import annotations

import pytest

from infra.cluster.serving.disaggregation import Disaggregation, Traffic, disaggregate
from infra.cluster.serving.overlap import overlap_decode
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.serving.h800 import H800
from tests.infra.cluster.serving.units import (
    DECODE_PRODUCTION,
    DECODE_REPORT,
    PREFILL_PRODUCTION,
    PREFILL_REPORT,
)

V3 = ModelConfig()
# A day of DeepSeek's service: 608e9 prompt and 168e9 output tokens, 4,989 tokens of cache for an output token
# on average. With replies of one length that makes prompts of 4,384 and replies of 1,211 tokens.
DAY = 86400
REPLY = 4989 / (608 / 168 + 0.5)
PRODUCTION = Traffic(168e9 / DAY / REPLY, prompt=REPLY * 608 / 168, output=REPLY)


@pytest.fixture(scope="module")
def production() -> Disaggregation:
    return disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION)


def test_units_carry_the_traffic(production: Disaggregation) -> None:
    d = production
    assert d.prefill_units * d.prefill.input * d.utilisation >= 608e9 / DAY
    assert (d.prefill_units - 1) * d.prefill.input * d.utilisation < 608e9 / DAY
    assert d.decode_units * d.decode.output * d.utilisation >= 168e9 / DAY
    assert (d.decode_units - 1) * d.decode.output * d.utilisation < 168e9 / DAY
    assert d.gpus == 32 * d.prefill_units + 144 * d.decode_units


def test_as_many_requests_as_time_and_memory_allow(production: Disaggregation) -> None:
    d = production.decode
    assert d.requests == d.memory.requests
    assert d.tpot <= 0.05
    tight = disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION, tpot_limit=0.03).decode
    assert tight.requests < tight.memory.requests
    assert tight.tpot <= 0.03
    more = overlap_decode(V3, H800, DECODE_PRODUCTION, tight.requests + 1, PRODUCTION.context)
    assert more.best > 0.03
    # Little's law: what is in the unit is what comes out in a second times how long it stays.
    assert tight.output * tight.tpot == pytest.approx(tight.concurrent)


def test_production_took_about_as_many_nodes(production: Disaggregation) -> None:
    """226.75 nodes on average over the day, at 20 to 22 tokens a second and request."""
    assert 226.75 / 1.5 < production.gpus / 8 < 226.75 * 1.5
    assert 20 < 1 / production.decode.tpot < 30


def test_throughput_is_above_production(production: Disaggregation) -> None:
    """73,700 prompt tokens (56.3% found in a cache) and 14,800 output tokens a second and node."""
    hits = Traffic(
        PRODUCTION.requests_per_second, PRODUCTION.prompt, PRODUCTION.output, cached=0.563 * PRODUCTION.prompt
    )
    found = disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, hits)
    assert 73_700 < 8 * found.prefill.input_per_gpu < 2.5 * 73_700
    assert 14_800 < 8 * found.decode.output_per_gpu < 2.5 * 14_800
    assert found.prefill.input == pytest.approx(found.prefill.computed / (1 - 0.563))
    assert found.prefill_units < production.prefill_units


def test_what_moves_between_units(production: Disaggregation) -> None:
    assert production.transfer_bytes == pytest.approx(PRODUCTION.prompt * 70_272)
    assert production.transfer_seconds == pytest.approx(production.transfer_bytes / 40e9)
    # What all requests bring is little beside the ports of the decode GPUs.
    ports = 40e9 * 144 * production.decode_units
    assert PRODUCTION.requests_per_second * production.transfer_bytes < 0.05 * ports


def test_waiting_is_told() -> None:
    small = disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION, prefill_tokens=4096)
    large = disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION, prefill_tokens=16384)
    assert small.ttft < large.ttft
    assert small.prefill.input < large.prefill.input
    assert large.latency > large.ttft + (PRODUCTION.output - 1) * large.decode.tpot


def test_the_report_s_units() -> None:
    """Its decode repeats the cache on four GPUs: it holds fewer requests, and answers sooner."""
    report = disaggregate(V3, H800, PREFILL_REPORT, DECODE_REPORT, PRODUCTION).decode
    later = disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION).decode
    assert report.requests < later.requests
    assert report.tpot < later.tpot
    assert report.memory.weights < later.memory.weights


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="tpot_limit is 1 ms, but one request a GPU already takes"):
        disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION, tpot_limit=0.001)
    with pytest.raises(ConfigError, match=r"traffic\.cached is 100"):
        Traffic(1, prompt=100, output=10, cached=100)
    with pytest.raises(ConfigError, match="utilisation is 0"):
        disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION, utilisation=0)
    with pytest.raises(ConfigError, match=r"prefill_tokens is 10000000, more than .* fit"):
        disaggregate(V3, H800, PREFILL_PRODUCTION, DECODE_PRODUCTION, PRODUCTION, prefill_tokens=1e7)
