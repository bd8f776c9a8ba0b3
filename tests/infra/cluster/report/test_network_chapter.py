"""The network's chapter: one reach in all of it, the layout's precision, nodes that groups do not fill."""

import pytest

from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES
from infra.cluster.network.all_to_all import all_to_all
from infra.cluster.network.gate_reach import gate_reach
from infra.cluster.report.network import network_chapter
from infra.cluster.training.layout import Layout

H800 = MACHINES["h800"]
TITLES = ("One MoE layer", "Dispatch when", "For ", "Latency")


def table(chapter, title):
    return next(each for each in chapter.tables if each.title.startswith(title))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_failures_slow_down_the_dispatch_of_the_table_above(precision):
    chapter = network_chapter(DEEPSEEK_V3, Layout(precision=precision), H800)
    dispatch, combine = table(chapter, "One MoE layer").rows[:2]
    one = table(chapter, "Dispatch when").rows[0]
    assert (one[0], one[5]) == ("1 of 8", pytest.approx(8 / 7))
    # Latency is in the first alone.
    assert one[4] == pytest.approx(8 / 7 * dispatch[3])
    assert combine[1] / dispatch[1] == pytest.approx({"fp8": 64 / 33, "bf16": 1}[precision])
    where = gate_reach(DEEPSEEK_V3, 64, 8)
    sent = all_to_all(DEEPSEEK_V3, 4096, 64, H800, where=where).combine.network_bytes
    assert combine[1] == pytest.approx(sent / 1e6)


def test_groups_on_several_nodes_are_said():
    assert not any(
        "groups of experts lie" in note for note in network_chapter(DEEPSEEK_V3, Layout(), H800).notes
    )
    notes = network_chapter(DEEPSEEK_V3, Layout(expert=128), H800).notes
    assert any("8 groups of experts lie on 16 nodes" in note for note in notes)


@pytest.mark.parametrize(
    ("layout", "machine", "shown"),
    [
        (Layout(), "h800", TITLES),
        (Layout(), "gb200-nvl72", TITLES[2:]),
        (Layout(expert=128), "gb200-nvl72", TITLES),
        (Layout(gpus=8, pipeline=1, expert=8, schedule="1f1b", global_batch=8), "h800", TITLES[3:]),
    ],
)
def test_only_what_crosses_a_network_is_told_of_it(layout, machine, shown):
    chapter = network_chapter(DEEPSEEK_V3, layout, MACHINES[machine])
    assert len(chapter.tables) == len(shown)
    assert all(each.title.startswith(title) for each, title in zip(chapter.tables, shown, strict=True))


def test_the_thirteen_experts_are_those_of_nominal_links():
    rows = {row.name: row for row in network_chapter(DEEPSEEK_V3, Layout(), H800).rows}
    nominal = [row for name, row in rows.items() if "nominal" in name or "rounded up" in name]
    assert [(row.ours, row.published) for row in nominal] == [
        (pytest.approx(3.2), 3.2),
        (pytest.approx(12.8), 13),
    ]
    assert rows["experts a token could have at this cost, links as reached"].ours == 16
