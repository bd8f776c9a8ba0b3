"""Latencies of small messages: the published points, and the line through them."""

import pytest

from infra.cluster.network.latency import INFINIBAND, LATENCIES, NVLINK, ROCE, Latency
from infra.cluster.network.topology import dragonfly, slim_fly, three_layer, two_layer
from infra.cluster.origin import Origin, origins
from infra.errors import ConfigError


@pytest.mark.parametrize(
    ("latency", "microseconds"), [(ROCE, (3.6, 5.6)), (INFINIBAND, (2.8, 3.7)), (NVLINK, (3.33, None))]
)
def test_the_published_points(latency, microseconds):
    assert latency.across(1) * 1e6 == pytest.approx(microseconds[0])
    if microseconds[1] is not None:
        assert latency.across(two_layer(64).farthest) * 1e6 == pytest.approx(microseconds[1])
    assert latency.origin == Origin.PUBLISHED
    assert latency in LATENCIES


def test_more_layers_take_longer():
    ways = [fabric.farthest for fabric in (slim_fly(27), dragonfly(16), three_layer(64))]
    seconds = [INFINIBAND.across(way) * 1e6 for way in ways]
    assert seconds == pytest.approx([3.7, 4.15, 4.6])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="one switch"):
        NVLINK.across(3)
    with pytest.raises(ConfigError, match="at least 1"):
        ROCE.across(0)
    with pytest.raises(ConfigError, match="cross_leaf"):
        Latency("backwards", 2e-6, 1e-6)
    with pytest.raises(ConfigError, match="cross_leaf"):
        Latency("nothing", 1e-6, float("nan"))


def test_origins_are_told_once_and_in_order():
    assert origins([Origin.PUBLISHED, Origin.PREDICTED, Origin.PUBLISHED]) == (
        Origin.PREDICTED,
        Origin.PUBLISHED,
    )
