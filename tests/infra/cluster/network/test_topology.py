"""Networks: ISCA'25 table 3, and small ones built link by link."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cluster.network.topology import (
    Fabric,
    Topology,
    dragonfly,
    for_endpoints,
    largest,
    multi_plane,
    slim_fly,
    three_layer,
    two_layer,
)
from infra.errors import ConfigError


@pytest.mark.parametrize(
    ("fabric", "endpoints", "switches", "links"),
    [
        (two_layer(64), 2048, 96, 2048),
        (multi_plane(64), 16384, 768, 16384),
        (three_layer(64), 65536, 5120, 131072),
        (slim_fly(28), 32928, 1568, 32928),
        (dragonfly(16, groups=511), 261632, 16352, 384272),
    ],
    ids=lambda value: str(value.topology) if isinstance(value, Fabric) else "",
)
def test_the_published_table_of_64_port_switches(fabric, endpoints, switches, links):
    assert (fabric.endpoints, fabric.switches, fabric.links) == (endpoints, switches, links)
    assert fabric.ports <= 64


def test_the_largest_of_64_port_switches():
    assert largest(Topology.TWO_LAYER, 64) == two_layer(64)
    assert largest(Topology.MULTI_PLANE, 64) == multi_plane(64)
    assert largest(Topology.THREE_LAYER, 64) == three_layer(64)
    # The table's q = 28 is no power of a prime; 27 is.
    assert not slim_fly(28).buildable
    assert largest(Topology.SLIM_FLY, 64) == slim_fly(27)
    assert (slim_fly(27).endpoints, slim_fly(27).ports) == (2 * 27**2 * 21, 62)
    # The table's 511 groups are two fewer than the construction allows.
    assert largest(Topology.DRAGONFLY, 64) == dragonfly(16)
    assert dragonfly(16).endpoints == 513 * 512


def eccentricity(neighbours: list[set[int]], start: int) -> int:
    """Hops to the farthest switch."""
    seen, edge, hops = {start}, {start}, 0
    while len(seen) < len(neighbours):
        edge = {n for one in edge for n in neighbours[one]} - seen
        assert edge, "not connected"
        seen |= edge
        hops += 1
    return hops


def mms_graph(q: int, root: int) -> list[set[int]]:
    """The graph of McKay, Miller and Siran over integers modulo a prime, with primitive root `root`."""
    powers = [pow(root, i, q) for i in range(q - 1)]
    if q % 4 == 1:
        even, odd = set(powers[0::2]), set(powers[1::2])
    else:
        w = (q + 1) // 4
        even = set(powers[0 : 2 * w : 2]) | set(powers[2 * w - 1 : 4 * w - 2 : 2])
        odd = set(powers[1 : 2 * w : 2]) | set(powers[2 * w : 4 * w - 2 : 2])
    neighbours: list[set[int]] = [set() for _ in range(2 * q * q)]

    def link(one: int, other: int) -> None:
        neighbours[one].add(other)
        neighbours[other].add(one)

    for x in range(q):
        for y in range(q):
            for other in range(q):
                if (y - other) % q in even:
                    link(x * q + y, x * q + other)
                if (y - other) % q in odd:
                    link(q * q + x * q + y, q * q + x * q + other)
                link(x * q + y, q * q + other * q + (y - other * x) % q)
    return neighbours


@pytest.mark.parametrize(("q", "root"), [(5, 2), (7, 3), (11, 2), (13, 2)])
def test_slim_fly_is_the_graph_built_link_by_link(q, root):
    graph, fabric = mms_graph(q, root), slim_fly(q)
    assert fabric.buildable
    assert fabric.switches == len(graph)
    assert fabric.links == sum(map(len, graph)) // 2
    degrees = {len(one) for one in graph}
    assert len(degrees) == 1
    assert fabric.ports == degrees.pop() + fabric.endpoints // fabric.switches
    assert fabric.farthest == 1 + max(eccentricity(graph, start) for start in range(len(graph)))


def test_slim_fly_of_prime_powers():
    """Hoffman-Singleton has 50 vertices of degree 7; there are fields of 4, 8, 9 and 16, none of 12 or 15."""
    assert (slim_fly(5).switches, slim_fly(5).links) == (50, 50 * 7 // 2)
    assert [q for q in range(3, 30) if q % 4 != 2 and not slim_fly(q).buildable] == [12, 15, 20, 21, 24, 28]


def test_dragonfly_is_the_graph_built_link_by_link():
    h, fabric = 2, dragonfly(2)
    size, groups = 2 * h, 2 * h * h + 1
    graph: list[set[int]] = [set() for _ in range(size * groups)]
    for group in range(groups):
        for one, other in combinations(range(size), 2):
            graph[group * size + one].add(group * size + other)
            graph[group * size + other].add(group * size + one)
    free = {group: [group * size + i for i in range(size) for _ in range(h)] for group in range(groups)}
    for one, other in combinations(range(groups), 2):
        a, b = free[one].pop(), free[other].pop()
        graph[a].add(b)
        graph[b].add(a)
    assert fabric.switches == len(graph)
    assert fabric.links == sum(map(len, graph)) // 2
    assert fabric.endpoints == fabric.switches * h
    assert fabric.ports == h + max(map(len, graph))
    assert fabric.farthest == 1 + max(eccentricity(graph, start) for start in range(len(graph)))


@given(topology=st.sampled_from(Topology), radix=st.sampled_from([8, 16, 36, 64, 128]), share=st.floats(0, 1))
def test_a_network_for_some_gpus_holds_them_and_is_no_larger_than_the_largest(topology, radix, share):
    most = largest(topology, radix)
    wanted = max(1, int(share * most.endpoints))
    fabric = for_endpoints(topology, wanted, radix)
    assert wanted <= fabric.endpoints <= most.endpoints
    assert fabric.switches <= most.switches
    assert fabric.links <= most.links
    assert fabric.ports <= radix
    assert fabric.buildable
    assert for_endpoints(topology, most.endpoints, radix) == most


@pytest.mark.parametrize("endpoints", [1, 100, 512, 1000, 2048])
def test_a_small_two_layer_tree_is_not_over_subscribed(endpoints):
    tree = for_endpoints(Topology.TWO_LAYER, endpoints, 64)
    leaves = tree.endpoints // 32
    spines = tree.switches - leaves
    assert leaves == -(-endpoints // 32)
    assert tree.links == tree.endpoints
    assert 32 % spines == 0
    assert leaves * (32 // spines) <= 64


def test_the_networks_of_2048_gpus():
    """Eight planes of 8 leaves and 4 spines have as many switches as one tree of 64 and 32."""
    planes, one = (
        for_endpoints(topology, 2048, 64) for topology in (Topology.MULTI_PLANE, Topology.TWO_LAYER)
    )
    assert planes.switches == 8 * (8 + 4) == one.switches == 64 + 32
    three = for_endpoints(Topology.THREE_LAYER, 2048, 64)
    assert (three.endpoints, three.switches) == (2048, 2 * 64 + 32)


def test_small_three_layer_trees():
    """Three pods of 4-port switches: 2 core groups of 2, since 2 links cannot go to fewer evenly."""
    tree = three_layer(4, 12)
    assert (tree.endpoints, tree.switches, tree.links) == (12, 3 * 4 + 4, 24)
    assert three_layer(4) == three_layer(4, 16)
    assert three_layer(4).switches == 5 * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: two_layer(63), "64 fits"),
        (lambda: two_layer(64, 2049), "1 to 2048"),
        (lambda: two_layer(64, 0), "1 to 2048"),
        (lambda: multi_plane(64, planes=0), "at least 1"),
        (lambda: slim_fly(6), "7 fits"),
        (lambda: slim_fly(1), "3 fits"),
        (lambda: dragonfly(0), "at least 1"),
        (lambda: dragonfly(2, groups=10), "2 to 9"),
        (lambda: largest(Topology.SLIM_FLY, 4), "needs"),
        (lambda: largest(Topology.DRAGONFLY, 2), "needs 3 ports"),
        (lambda: for_endpoints(Topology.TWO_LAYER, 2049, 64), "at most 2048"),
        (lambda: for_endpoints(Topology.TWO_LAYER, 0, 64), "at least 1"),
        (lambda: largest("Slim Flea", 64), "Slim Fly"),
        (lambda: Fabric(Topology.TWO_LAYER, 0, 1, 1, 4, 3), "no sensible size"),
        (lambda: Fabric(Topology.TWO_LAYER, 100, 1, 1, 64, 3), "more cables"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
