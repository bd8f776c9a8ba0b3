"""The chapter on memory: what stages keep, times what is alive, is what ranks hold."""

import pytest

from infra.cluster.report.memory import memory_chapter
from infra.cluster.training.step import live
from tests.infra.cluster.report import v3


def test_activations_of_a_rank_are_those_of_its_stages():
    plan = v3.plan()
    ranks, stages = memory_chapter(plan).tables[:2]
    place = ranks.head.index("activations")
    layout = plan.step.layout
    kept = [row[2] for row in stages.rows]
    assert [row[1] for row in stages.rows] == [4] * 15 + [1]
    for rank, alive in enumerate(live(plan.request.shape)(layout)):
        expected = sum(count * kept[stage] for stage, count in zip(layout.held(rank), alive, strict=True))
        assert ranks.rows[rank][place] == pytest.approx(expected)
