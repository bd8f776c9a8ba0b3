"""Costs of networks: by hand, and against ISCA'25 table 3 by the prices that it implies."""

import pytest

from infra.cluster.network.fabric_cost import (
    ISCA_TABLE_3,
    MILLION_ROUNDING,
    PRICED_ALIKE,
    Prices,
    fabric_cost,
    inferred_prices,
)
from infra.cluster.network.topology import Topology, dragonfly, multi_plane, slim_fly, three_layer, two_layer
from infra.errors import ConfigError

FABRICS = {
    Topology.TWO_LAYER: two_layer(64),
    Topology.MULTI_PLANE: multi_plane(64),
    Topology.THREE_LAYER: three_layer(64),
    Topology.SLIM_FLY: slim_fly(28),
    Topology.DRAGONFLY: dragonfly(16, groups=511),
}


def within(column, prices: Prices) -> bool:
    """Whether both cost figures of a column come out as printed."""
    cost = fabric_cost(FABRICS[column.topology], prices)
    return (
        abs(cost.dollars / 1e6 - column.millions) <= MILLION_ROUNDING
        and abs(cost.dollars_an_endpoint / 1e3 - column.thousands_an_endpoint) <= column.rounding
    )


def test_cost_by_hand():
    cost = fabric_cost(two_layer(4), Prices(switch=100, link=10, endpoint=1))
    assert cost.dollars == 6 * 100 + 8 * 10 + 8 * 1
    assert cost.dollars_an_endpoint == 86.0
    assert (cost.switches, cost.links, cost.endpoints) == (600, 80, 8)


def test_inferred_prices_give_the_published_costs_within_rounding():
    prices = inferred_prices()
    assert all(within(column, prices) for column in PRICED_ALIKE)
    assert len(PRICED_ALIKE) == 4
    assert "inferred" in prices.source


def test_dragonfly_is_the_column_they_do_not_explain():
    """1.4 % above the published 1522 million: outside rounding. No prices explain all columns."""
    column = ISCA_TABLE_3[-1]
    dollars = fabric_cost(FABRICS[column.topology], inferred_prices()).dollars
    assert not within(column, inferred_prices())
    assert dollars / 1e6 == pytest.approx(column.millions, rel=0.02)
    with pytest.raises(ConfigError, match="negative"):
        inferred_prices(ISCA_TABLE_3)


@pytest.mark.parametrize(("switch", "two", "three"), [(33e3, 4394.8, 7492.0), (82e3, 4388.0, 7484.6)])
def test_the_table_leaves_the_price_of_a_switch_wide_open(switch, two, three):
    """An endpoint of FT2 costs e + 3/64 s + l and one of FT3 e + 5/64 s + 2 l: each s has its e and l."""
    link = three - two - switch / 32
    endpoint = two - link - switch * 3 / 64
    assert all(within(column, Prices(switch, link, endpoint)) for column in PRICED_ALIKE)


@pytest.mark.parametrize("switch", [30e3, 87e3])
def test_but_not_open_without_end(switch):
    """Slim Fly less FT2 is s x (1568/32928 - 3/64) an endpoint, whatever a link costs."""
    difference = switch * (1568 / 32928 - 3 / 64)
    least = (ISCA_TABLE_3[3].millions - MILLION_ROUNDING) * 1e6 / 32928 - 4395
    most = (ISCA_TABLE_3[3].millions + MILLION_ROUNDING) * 1e6 / 32928 - 4385
    assert not least <= difference <= most


def test_prices_that_cannot_be_found_or_are_no_prices_are_refused():
    with pytest.raises(ConfigError, match="leave a price open"):
        inferred_prices(ISCA_TABLE_3[:2])
    with pytest.raises(ConfigError, match=r"prices\.link"):
        Prices(1, -1, 1)
