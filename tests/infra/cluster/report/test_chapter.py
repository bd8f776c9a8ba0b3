"""Cells, figures and tables: how numbers are written, and when a figure holds."""

import textwrap

import pytest

from infra.cluster.report.chapter import LEGEND, Chapter, Table, beside, cell, figure, figures
from infra.cluster.report.text import to_text

CELLS = [
    (None, ""),
    ("as it is", "as it is"),
    (0, "0"),
    (671_026_419_200, "671,026,419,200"),
    (0.0, "0"),
    (62_914_560.0, "62,914,560"),
    (19.27312, "19.273"),
    (9999.5, "9,999.5"),
    (12345.678, "12,346"),
    (0.40345123, "0.40345"),
    (0.00123456, "0.0012346"),
    (0.0001234567, "0.000123"),
    (-0.5, "-0.5"),
    (-1e-9, "-1e-09"),
    (float("inf"), "inf"),
    (float("nan"), "nan"),
]


@pytest.mark.parametrize(("value", "text"), CELLS)
def test_cells(value, text):
    assert cell(value) == text


def test_a_figure_beside_a_published_one_holds_within_its_share():
    near, far = beside("x", "s", 104.0, 100.0, 0.05), beside("x", "s", 94.0, 100.0, 0.05)
    assert (near.holds, far.holds) == (True, False)
    assert (near.ratio, near.goal, near.published, near.ours) == (1.04, 105.0, 100.0, 104.0)
    assert far.goal == 95.0
    assert beside("x", "", 1, 1, 0.0).holds is True
    assert beside("x", "", 2, 1, 0.0).holds is False
    assert beside("x", "", float("nan"), 1.0, 1.0).holds is False
    # A figure that is only told has no goal to miss.
    assert beside("x", "", 3.0, 1.0).holds is None
    assert beside("x", "", 3.0, 0.0).ratio is None
    alone = figure("x", "s", 2.0)
    assert (alone.published, alone.ratio, alone.holds) == (None, None, None)


def test_figures_say_how_far_apart_and_whether_a_goal_is_met():
    rows = (
        beside("near", "s", 104.0, 100.0, 0.05),
        beside("far", "s", 90.0, 100.0, 0.05),
        beside("wrong", "", 2, 1, 0.0, must=True),
        beside("told", "s", 3.0, 2.0),
        beside("same", "", 2, 2, 0.0, must=True),
        figure("alone", "s", 1.0),
    )
    assert [row[-2:] for row in figures(rows).rows] == [
        ("+4.00%", "holds"),
        ("-10.00%", "misses"),
        ("+100.00%", "FAILS"),
        ("+50.00%", ""),
        ("equal", "holds"),
        (None, ""),
    ]


def test_a_table_of_uneven_rows_is_refused():
    with pytest.raises(ValueError, match="'sizes': a row of 1 cells under 2"):
        Table("sizes", ("a", "b"), ((1,),))


def test_text_sets_numbers_right_and_leaves_empty_columns_out():
    table = Table(
        "Sizes", ("name", "bytes", "note", "share"), (("a", 5, None, "1%"), ("bc", 1234, "", "10%"))
    )
    lines = to_text("Plan", [Chapter("One", (), (table,), ("A remark.",))]).splitlines()
    assert lines == [
        "Plan",
        "====",
        "",
        *textwrap.wrap(LEGEND, 110),
        "",
        "One",
        "---",
        "",
        "Sizes",
        "name  bytes  share",
        "a         5  1%",
        "bc    1,234  10%",
        "",
        "A remark.",
    ]
