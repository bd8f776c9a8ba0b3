"""Tokens a second at home, against what is published (ISCA §2.2.2, KTransformers)."""

from __future__ import annotations

import pytest

from infra.cluster.counts.shapes import DEEPSEEK_V2
from infra.cluster.serving.hardware import AI_SOC, AI_SOC_WIDE, TWO_SOCKETS, Host
from infra.cluster.serving.local import Q4_K, local, local_dense
from infra.errors import ConfigError
from model.config import ModelConfig

V3 = ModelConfig()


def test_v2_on_a_pc_with_one_chip() -> None:
    """21B of 236B weights active: "nearly 20 tokens a second, or even twice that"."""
    found = local(DEEPSEEK_V2, AI_SOC)
    assert found.fits
    assert 20 < found.tokens_per_second < 30
    assert 40 < local(DEEPSEEK_V2, AI_SOC_WIDE).tokens_per_second < 60
    # By hand: 21B weights of half a byte over 256 GB/s, the head included.
    assert found.tokens_per_second == pytest.approx(256e9 / (20.9e9 * 0.5), rel=0.01)


def test_a_dense_model_of_70b_stays_in_single_digits() -> None:
    assert local_dense(70e9, AI_SOC).tokens_per_second == pytest.approx(256 / 35)
    assert local_dense(70e9, AI_SOC).tokens_per_second < 10


def test_all_of_v3_on_a_server() -> None:
    """About 20 tokens a second (ISCA); KTransformers measures 13.4 with eight experts. The bound is above."""
    found = local(V3, TWO_SOCKETS, Q4_K, context=4096)
    assert found.fits
    assert 20 < found.tokens_per_second < 40
    # It needs 14 GB of the GPU's memory as KTransformers says, buffers included.
    assert 8e9 < found.gpu_weights < 14e9
    assert found.host_bytes == 58 * 8 * 44_040_192 * Q4_K


def test_a_gpu_takes_its_part_off_the_host() -> None:
    bare = Host("no GPU", TWO_SOCKETS.memory, TWO_SOCKETS.memory_bandwidth)
    without, with_it = local(V3, bare, Q4_K), local(V3, TWO_SOCKETS, Q4_K)
    assert without.host_bytes == pytest.approx(with_it.host_bytes + with_it.gpu_bytes)
    assert without.tokens_per_second < with_it.tokens_per_second
    assert without.gpu_bytes == 0


def test_context_costs_its_cache() -> None:
    short, long = local(V3, TWO_SOCKETS, Q4_K), local(V3, TWO_SOCKETS, Q4_K, context=10_000)
    assert long.gpu_bytes - short.gpu_bytes == 10_000 * 70_272
    assert long.tokens_per_second < short.tokens_per_second


def test_what_does_not_fit() -> None:
    assert not local(V3, AI_SOC).fits
    assert not local(V3, TWO_SOCKETS, Q4_K, context=300_000).fits
    with pytest.raises(ConfigError, match="describe one GPU"):
        Host("half", 1e9, 1e9, gpu_memory=1e9)
    with pytest.raises(ConfigError, match=r"host\.memory_bandwidth is 0"):
        Host("none", 1e9, 0)
    with pytest.raises(ConfigError, match="weight is 0"):
        local(V3, AI_SOC, weight=0)
    with pytest.raises(ConfigError, match="elements is -1"):
        local_dense(-1, AI_SOC)
