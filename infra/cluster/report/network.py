"""Chapter: what experts send each other, the networks that could carry it, and a plane that fails."""

from __future__ import annotations

from dataclasses import replace

from infra.cluster import published
from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES, Machine
from infra.cluster.network.all_to_all import (
    AllToAll,
    Reach,
    all_to_all,
    experts_at_no_cost,
    value_bytes,
)
from infra.cluster.network.fabric_cost import ISCA_TABLE_3, fabric_cost, inferred_prices
from infra.cluster.network.gate_reach import gate_reach
from infra.cluster.network.latency import LATENCIES
from infra.cluster.network.plane_failure import lost_planes, lost_spines
from infra.cluster.network.topology import (
    Fabric,
    Topology,
    dragonfly,
    for_endpoints,
    multi_plane,
    slim_fly,
    three_layer,
    two_layer,
)
from infra.cluster.report.chapter import Chapter, Table, beside, figure
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import Layout
from infra.errors import ConfigError
from kernels.figures import Row

RADIX = 64
"""Ports of a switch in ISCA'25 table 3."""
FAILURES = (1, 2, 4)


def network_chapter(shape: ModelShape, layout: Layout, machine: Machine) -> Chapter:
    """All-to-all of the layout's MoE layers, topologies beside ISCA'25 table 3, failure of planes."""
    rows: list[Row] = []
    tables: list[Table] = []
    notes: list[str] = []
    if layout.expert > machine.gpus_per_node:
        where = gate_reach(shape, layout.expert, machine.gpus_per_node)
        anywhere = gate_reach(shape, layout.expert, machine.gpus_per_node, node_limited=False)
        dispatch, combine = value_bytes(layout.precision)
        limited, free = (
            all_to_all(shape, layout.micro_tokens, layout.expert, machine, dispatch, combine, where=each)
            for each in (where, anywhere)
        )
        tables.append(_exchanges(limited, free))
        rows += [
            figure("nodes that a token reaches, as the gate routes", "nodes", where.nodes_reached),
            figure("nodes if the best experts of all were picked", "nodes", anywhere.nodes_reached),
            figure(
                "experts a token could have at this cost, links as reached",
                "experts",
                experts_at_no_cost(shape, machine),
            ),
        ]
        tables.append(_failures(shape, layout, machine, where, dispatch))
        notes += _spread(shape, where)
    rows += _nominal()
    rows += _fabrics()
    if layout.gpus > machine.gpus_per_node:
        tables.append(_sized(layout.gpus))
    tables.append(_latencies())
    notes.append(
        "Prices behind ISCA'25 table 3 are not published. Those used here are the ones that explain its fat "
        "trees and its Slim Fly within rounding; Dragonfly's cost follows another, unpublished rule. The "
        "Slim Fly that the table counts cannot be built: its q = 28 is no prime power."
    )
    return Chapter("Network", tuple(rows), tuple(tables), tuple(notes))


def _spread(shape: ModelShape, where: Reach) -> list[str]:
    """What is allowed and should be known: routing groups that lie on several nodes each."""
    if shape.topk_group == shape.n_group or where.nodes <= shape.n_group:
        return []
    return [
        f"The router's {shape.n_group} groups of experts lie on {where.nodes} nodes, none of them whole on "
        f"one: a token kept to {shape.topk_group} groups reaches {where.nodes_reached:.2g} nodes on average."
    ]


def _nominal() -> list[Row]:
    """DeepSeek-V3 on the H800's links as the report states them."""
    machine = replace(MACHINES["h800"], network=published.NOMINAL_PORT.value)
    found = experts_at_no_cost(DEEPSEEK_V3, machine)
    return [
        beside(
            "experts a node at the cost of one, nominal H800 links",
            "experts",
            found / DEEPSEEK_V3.topk_group,
            published.EXPERTS_A_NODE.value,
            1e-9,
            must=True,
        ),
        beside(
            "the same in DeepSeek-V3's four nodes, rounded up there",
            "experts",
            found,
            published.EXPERTS_AT_NO_COST.value,
            2e-2,
            must=True,
        ),
    ]


def _exchanges(limited: AllToAll, free: AllToAll) -> Table:
    lines = []
    for name, found in (("node-limited, as the gate routes", limited), ("best experts of any node", free)):
        for part in ("dispatch", "combine"):
            each = getattr(found, part)
            lines.append(
                (
                    f"{part}, {name}",
                    each.network_bytes / 1e6,
                    each.nvlink_bytes / 1e6,
                    1e3 * each.network_seconds,
                    1e3 * each.nvlink_seconds,
                    1e3 * each.seconds,
                    each.bound_by,
                )
            )
    head = ("all-to-all", "network, MB", "NVLink, MB", "network, ms", "NVLink, ms", "ms", "bound by")
    return Table("One MoE layer, one micro-batch, one GPU", head, tuple(lines))


def _failures(shape: ModelShape, layout: Layout, machine: Machine, where: Reach, dispatch: float) -> Table:
    """Parts of the network, one for each GPU of a node, of which some are out."""
    parts, lines = where.gpus_per_node, []
    for failed in (each for each in FAILURES if each < parts):
        setting = (shape, layout.micro_tokens, layout.expert, machine, failed)
        for found in (
            lost_planes(*setting, value_bytes=dispatch, where=where),
            lost_spines(*setting, parts, value_bytes=dispatch, where=where),
        ):
            lines.append(
                (
                    f"{found.failed} of {found.parts}",
                    found.name,
                    found.bandwidth / 1e9,
                    f"{100 * found.own_port:.0f}%",
                    1e3 * found.seconds,
                    found.slow_down,
                )
            )
    head = ("failed", "network", "GB/s left a GPU", "GPUs on their own port", "dispatch, ms", "times as long")
    return Table("Dispatch when part of the network fails", head, tuple(lines))


def _fabrics() -> list[Row]:
    """Every column of the table: counts by construction, costs by the inferred prices."""
    prices = inferred_prices()
    built = {
        Topology.TWO_LAYER: two_layer(RADIX),
        Topology.MULTI_PLANE: multi_plane(RADIX),
        Topology.THREE_LAYER: three_layer(RADIX),
        Topology.SLIM_FLY: slim_fly(28),
        Topology.DRAGONFLY: dragonfly(16, groups=511),
    }
    rows = []
    for column in ISCA_TABLE_3:
        fabric = built[column.topology]
        cost = fabric_cost(fabric, prices)
        name = str(column.topology)
        rows += [
            beside(f"{name}: endpoints", "", fabric.endpoints, column.endpoints, 0.0, must=True),
            beside(f"{name}: switches", "", fabric.switches, column.switches, 0.0, must=True),
            beside(f"{name}: links", "", fabric.links, column.links, 0.0, must=True),
            beside(f"{name}: cost, inferred prices", "million dollars", cost.dollars / 1e6, column.millions),
            beside(
                f"{name}: cost an endpoint",
                "thousand dollars",
                cost.dollars_an_endpoint / 1e3,
                column.thousands_an_endpoint,
            ),
        ]
    return rows


def _sized(gpus: int) -> Table:
    """What each topology needs for this many GPUs."""
    prices = inferred_prices()
    lines = []
    for topology in Topology:
        try:
            fabric: Fabric = for_endpoints(topology, gpus, RADIX)
        except ConfigError:
            lines.append((str(topology), None, None, None, None, "too small"))
            continue
        cost = fabric_cost(fabric, prices)
        lines.append(
            (
                str(topology),
                fabric.endpoints,
                fabric.switches,
                fabric.links,
                cost.dollars / 1e6,
                f"{fabric.farthest} switches",
            )
        )
    head = ("topology", "endpoints", "switches", "links", "million dollars", "farthest")
    return Table(f"For {gpus:,} GPUs, {RADIX}-port switches", head, tuple(lines))


def _latencies() -> Table:
    lines = tuple(
        (each.name, 1e6 * each.same_leaf, None if each.cross_leaf is None else 1e6 * each.cross_leaf)
        for each in LATENCIES
    )
    return Table(
        "Latency of 64 bytes, a published input (ISCA'25, table 5)",
        ("link", "same leaf, us", "across leaves, us"),
        lines,
    )
