"""Networks by their published constructions: endpoints, switches and links of each, from the switch's ports.

Fat trees of two and three layers (Leiserson; the k-ary form of Al-Fares et al.), the multi-plane two-layer
fat tree (ISCA'25 §5.1), Slim Fly (Besta and Hoefler, SC'14) and Dragonfly (Kim et al., ISCA'08), none of them
over-subscribed. Links are those between switches; every endpoint has one more, to its switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, takewhile

from infra.errors import ConfigError, nearest


class Topology(StrEnum):
    TWO_LAYER = "two-layer fat tree"
    MULTI_PLANE = "multi-plane two-layer fat tree"
    THREE_LAYER = "three-layer fat tree"
    SLIM_FLY = "Slim Fly"
    DRAGONFLY = "Dragonfly"


PLANES = 8
"""Planes of the multi-plane tree: one for each GPU of a node with its own network card."""


@dataclass(frozen=True)
class Fabric:
    """One network."""

    topology: Topology
    endpoints: int
    switches: int
    links: int
    """Links between switches."""
    ports: int
    """Ports in use of the switch that uses most."""
    farthest: int
    """Switches that a message passes between the two endpoints farthest apart, on the shortest way."""
    buildable: bool = True
    """False where only the counting formulas hold: no such graph exists."""

    def __post_init__(self) -> None:
        if min(self.endpoints, self.switches, self.ports, self.farthest) < 1 or self.links < 0:
            raise ConfigError(f"a {self.topology} of {self.endpoints} endpoints has no sensible size: {self}")
        # Every link between switches takes two ports, every endpoint one, and there are no others.
        if 2 * self.links + self.endpoints > self.switches * self.ports:
            raise ConfigError(f"{self.topology}: more cables than {self.switches} x {self.ports} ports")


def two_layer(radix: int, endpoints: int | None = None) -> Fabric:
    """Leaves with half of their ports up and half down, and spines: k^2/2 endpoints, 3k/2 switches when full.

    A smaller one has as many leaves as it needs, and spines to which every leaf has the same number of links.
    """
    half = _half(radix)
    leaves = _units(endpoints, half, radix, "a two-layer fat tree")
    spines = _even_share(half, leaves)
    return Fabric(Topology.TWO_LAYER, leaves * half, leaves + spines, leaves * half, radix, 3)


def multi_plane(radix: int, endpoints: int | None = None, planes: int = PLANES) -> Fabric:
    """`planes` two-layer trees that share nothing; the GPU of index i in its node is in plane i."""
    if planes < 1:
        raise ConfigError(f"planes is {planes}: there must be at least 1, {PLANES} for nodes of 8 GPUs")
    plane = two_layer(radix, None if endpoints is None else -(-endpoints // planes))
    return Fabric(
        Topology.MULTI_PLANE,
        planes * plane.endpoints,
        planes * plane.switches,
        planes * plane.links,
        radix,
        plane.farthest,
    )


def three_layer(radix: int, endpoints: int | None = None) -> Fabric:
    """Pods of k/2 leaves and k/2 aggregation switches under a core.

    Full: k^3/4 endpoints, 5k^2/4 switches. A smaller one has whole pods, at least two, and a core to which
    every pod has the same number of links.
    """
    half = _half(radix)
    pods = max(2, _units(endpoints, half * half, radix, "a three-layer fat tree"))
    core = half * _even_share(half, pods)
    return Fabric(
        Topology.THREE_LAYER, pods * half * half, pods * radix + core, 2 * pods * half * half, radix, 5
    )


def slim_fly(q: int) -> Fabric:
    """2q^2 switches of (3q - d)/2 links each, where q = 4w + d and d is -1, 0 or 1, at most two hops apart.

    Each switch has ceil(links/2) endpoints. The graphs (McKay, Miller, Siran) exist where q is a power of a
    prime; for other q this counts what the formulas give, and says that it is not buildable.
    """
    if q < 3 or q % 4 == 2:
        raise ConfigError(f"q is {q}: Slim Fly needs 4w - 1, 4w or 4w + 1; {max(3, q + 1)} fits")
    degree = (3 * q - _delta(q)) // 2
    hosts = -(-degree // 2)
    switches = 2 * q * q
    return Fabric(
        Topology.SLIM_FLY,
        switches * hosts,
        switches,
        switches * degree // 2,
        degree + hosts,
        3,
        buildable=_is_prime_power(q),
    )


def dragonfly(h: int, groups: int | None = None) -> Fabric:
    """Balanced: h endpoints and h links to other groups a switch, groups of 2h switches, each linked to each.

    At most 2h^2 + 1 groups, when each pair of groups has one link. With fewer, the ports that are over make
    second links, so every switch keeps its h.
    """
    if h < 1:
        raise ConfigError(f"h is {h}: a switch needs at least 1 link to other groups")
    size = 2 * h
    most = size * h + 1
    groups = most if groups is None else groups
    if not 2 <= groups <= most:
        raise ConfigError(f"groups is {groups}: with h = {h} there may be 2 to {most}")
    within = groups * size * (size - 1) // 2
    between = groups * size * h // 2
    return Fabric(Topology.DRAGONFLY, groups * size * h, groups * size, within + between, h + size - 1 + h, 4)


def largest(topology: Topology, radix: int, planes: int = PLANES) -> Fabric:
    """The largest such network that can be built of switches with `radix` ports."""
    return _kind(topology)(None, radix, planes)


def for_endpoints(topology: Topology, endpoints: int, radix: int, planes: int = PLANES) -> Fabric:
    """The smallest such network of switches with `radix` ports for at least `endpoints` GPUs.

    Raises ConfigError where `radix` ports do not reach so far; the message says how far they do.
    """
    if endpoints < 1:
        raise ConfigError(f"endpoints is {endpoints}: a network has at least 1")
    limit = largest(topology, radix, planes).endpoints
    if endpoints > limit:
        raise ConfigError(
            f"endpoints is {endpoints}: a {topology} of {radix}-port switches has at most {limit}"
        )
    return _kind(topology)(endpoints, radix, planes)


def _slim_fly_for(endpoints: int | None, radix: int, planes: int) -> Fabric:
    sizes = [one for one in _slim_flies(radix) if one.buildable]
    if not sizes:
        raise ConfigError(f"radix is {radix}: the smallest Slim Fly needs {slim_fly(3).ports} ports")
    return sizes[-1] if endpoints is None else next(one for one in sizes if one.endpoints >= endpoints)


def _dragonfly_for(endpoints: int | None, radix: int, planes: int) -> Fabric:
    h = (radix + 1) // 4
    if h < 1:
        raise ConfigError(f"radix is {radix}: the smallest balanced Dragonfly needs 3 ports")
    return dragonfly(h, None if endpoints is None else max(2, -(-endpoints // (2 * h * h))))


def _kind(topology: Topology) -> Callable[[int | None, int, int], Fabric]:
    """How a network of one kind is sized: (endpoints or None for the largest, radix, planes)."""
    kinds: dict[str, Callable[[int | None, int, int], Fabric]] = {
        Topology.TWO_LAYER: lambda endpoints, radix, planes: two_layer(radix, endpoints),
        Topology.MULTI_PLANE: lambda endpoints, radix, planes: multi_plane(radix, endpoints, planes),
        Topology.THREE_LAYER: lambda endpoints, radix, planes: three_layer(radix, endpoints),
        Topology.SLIM_FLY: _slim_fly_for,
        Topology.DRAGONFLY: _dragonfly_for,
    }
    if topology not in kinds:
        raise ConfigError(f"topology {topology!r} is unknown: {nearest(str(topology), kinds)}")
    return kinds[topology]


def _slim_flies(radix: int) -> Iterator[Fabric]:
    """All whose switches need at most `radix` ports, smallest first."""
    return takewhile(lambda fabric: fabric.ports <= radix, (slim_fly(q) for q in count(3) if q % 4 != 2))


def _half(radix: int) -> int:
    if radix < 2 or radix % 2:
        raise ConfigError(f"radix is {radix}: half the ports go up, so it must be even; {radix + 1} fits")
    return radix // 2


def _units(endpoints: int | None, each: int, most: int, what: str) -> int:
    """Leaves or pods of `each` endpoints that hold `endpoints`; all there can be for None."""
    if endpoints is None:
        return most
    needed = -(-endpoints // each)
    if not 1 <= needed <= most:
        raise ConfigError(f"endpoints is {endpoints}: {what} holds 1 to {each * most}")
    return needed


def _even_share(uplinks: int, below: int) -> int:
    """Fewest switches of 2 x `uplinks` ports over `below` switches that each have as many links to each.

    They must have ports enough and divide the uplinks.
    """
    return next(n for n in range(1, uplinks + 1) if uplinks % n == 0 and 2 * n >= below)


def _delta(q: int) -> int:
    return {0: 0, 1: 1, 3: -1}[q % 4]


def _is_prime_power(number: int) -> bool:
    factor = next(f for f in count(2) if number % f == 0)
    while number % factor == 0:
        number //= factor
    return number == 1
