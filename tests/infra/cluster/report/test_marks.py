"""What stands beside a published figure: limits in its unit, and what must hold told from what is hoped."""

import pytest

from infra.cluster.report.chapter import beside, figure, figures
from infra.cluster.report.schedules import schedules_chapter


def test_a_goal_is_a_limit_on_ours():
    """Published 200 within 5%: 190 to 210, of which the side that ours is on."""
    over, under = beside("x", "s", 215.0, 200.0, 0.05), beside("x", "s", 195.0, 200.0, 0.05)
    assert (over.goal, over.holds) == (pytest.approx(210.0), False)
    assert (under.goal, under.holds) == (pytest.approx(190.0), True)
    assert beside("x", "s", 215.0, 200.0).goal is None


def test_what_must_hold_fails_and_what_is_hoped_for_misses():
    rows = [
        beside("count", "", 5, 4, 0.0, must=True),
        beside("measure", "", 5, 4, 0.1, must=True),
        beside("prediction", "", 5, 4, 0.1),
        beside("good", "", 4, 4, 0.0, must=True),
        beside("apart", "", 5, 4),
        figure("alone", "", 5),
    ]
    assert [row[-1] for row in figures(rows).rows] == ["FAILS", "FAILS", "misses", "holds", "", ""]


def test_every_method_of_the_pipeline_is_as_published():
    """A V on half the devices: two stages of parameters on each, as DualPipe has."""
    rows = {row.name: row for row in schedules_chapter().rows}
    assert len(rows) == 4 * 3 * 3
    assert all(row.holds for row in rows.values())
    v = rows["dualpipev, as dualpipe in its repository, 8 stages on 4 devices: parameters"]
    assert (v.ours, v.published) == (2, 2)
    assert rows["1f1b, 8 stages on 8 devices: parameters"].ours == 1
