"""What a network costs, from the prices of its parts, and prices that explain a published table.

The prices behind ISCA'25 table 3 are not published. `inferred_prices` finds them from the table's own counts
and costs; they are the table's, not a market's, and they are never a default: who plans gives prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from infra.cluster.network.topology import Fabric, Topology
from infra.cluster.origin import Origin
from infra.errors import ConfigError


@dataclass(frozen=True)
class Prices:
    """Dollars. The cable to an endpoint is shorter than those between switches, and priced apart."""

    switch: float
    link: float
    """One link between switches, with whatever plugs in at its two ends."""
    endpoint: float
    """One link from a switch to an endpoint, without the endpoint's network card."""
    source: str = "the user"

    def __post_init__(self) -> None:
        for name in ("switch", "link", "endpoint"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ConfigError(f"prices.{name} is {value}: it must be dollars, 0 or more")


@dataclass(frozen=True)
class FabricCost:
    """Dollars of one network."""

    fabric: Fabric
    prices: Prices
    switches: float
    links: float
    endpoints: float

    @property
    def dollars(self) -> float:
        return self.switches + self.links + self.endpoints

    @property
    def dollars_an_endpoint(self) -> float:
        return self.dollars / self.fabric.endpoints


def fabric_cost(fabric: Fabric, prices: Prices) -> FabricCost:
    """Dollars of `fabric` by its parts. A switch costs the same whatever ports it uses."""
    return FabricCost(
        fabric,
        prices,
        switches=fabric.switches * prices.switch,
        links=fabric.links * prices.link,
        endpoints=fabric.endpoints * prices.endpoint,
    )


@dataclass(frozen=True)
class PublishedFabric:
    """One column of ISCA'25 table 3: 64-port switches at 400 Gbit/s, costs as rounded there."""

    topology: Topology
    endpoints: int
    switches: int
    links: int
    millions: float
    """Dollars in millions, rounded to one million."""
    thousands_an_endpoint: float
    rounding: float
    """Of the last, in thousands: half of its last digit."""
    origin: Origin = Origin.PUBLISHED


ISCA_TABLE_3 = (
    PublishedFabric(Topology.TWO_LAYER, 2048, 96, 2048, 9, 4.39, 0.005),
    PublishedFabric(Topology.MULTI_PLANE, 16384, 768, 16384, 72, 4.39, 0.005),
    PublishedFabric(Topology.THREE_LAYER, 65536, 5120, 131072, 491, 7.5, 0.05),
    PublishedFabric(Topology.SLIM_FLY, 32928, 1568, 32928, 146, 4.4, 0.05),
    PublishedFabric(Topology.DRAGONFLY, 261632, 16352, 384272, 1522, 5.8, 0.05),
)
PRICED_ALIKE = tuple(row for row in ISCA_TABLE_3 if row.topology != Topology.DRAGONFLY)
"""The columns that three prices explain together, within rounding. With Dragonfly they would need a switch of
negative price, so its cost must follow another rule, unpublished."""
MILLION_ROUNDING = 0.5


def inferred_prices(table: Sequence[PublishedFabric] = PRICED_ALIKE) -> Prices:
    """Prices that come nearest to both cost figures of each column: least squares in units of their rounding.

    They explain, they do not measure: the columns differ little in switches an endpoint, so a switch between
    33,000 and 82,000 dollars, with links to match, stays within the same rounding.

    Raises ConfigError where the columns leave a price open or make one negative.
    """
    rows, wanted = [], []
    for column in table:
        counts = np.array([column.switches, column.links, column.endpoints], dtype=np.float64)
        rows += [
            counts / 1e6 / MILLION_ROUNDING,
            counts / column.endpoints / 1e3 / column.rounding,
        ]
        wanted += [column.millions / MILLION_ROUNDING, column.thousands_an_endpoint / column.rounding]
    found, _, rank, _ = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)
    if rank < 3:
        raise ConfigError(
            f"table has {len(table)} columns that leave a price open: give at least three in which switches "
            "and links an endpoint differ"
        )
    if found.min() < 0:
        raise ConfigError(
            "table cannot be explained by prices of a switch, a link and an endpoint's link: one would be "
            f"negative ({', '.join(f'{price:.0f}' for price in found)}); leave out the column that differs"
        )
    switch, link, endpoint = (float(price) for price in found)
    return Prices(switch, link, endpoint, source="inferred from ISCA'25 table 3")
