"""Problem sets: drawn once each, split by hash whatever the seed, and read back with errors that help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import HeadwaterError
from post_training import problem_sets
from post_training.problem_sets import Wanted, draw, read, read_asked, rows, spread, write
from post_training.tasks.problem import SYSTEM, Problem, is_held_out
from post_training.tasks.registry import FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_draw_gives_different_problems_on_their_side_of_the_split(family: str) -> None:
    size = 60 if family == "passkey" else 5
    train, held = draw(Wanted(family, 300, 60, size), 0.1, seed=0)
    assert (len(train), len(held)) == (300, 60)
    assert len({p.id for p in train + held}) == 360
    assert not any(is_held_out(p, 0.1) for p in train)
    assert all(is_held_out(p, 0.1) for p in held)


def test_no_held_out_problem_is_trained_on_at_any_seed() -> None:
    wanted = Wanted("sorting", 800, 60, 3)
    drawn = [draw(wanted, 0.2, seed) for seed in range(6)]
    trained = {p.id for train, _ in drawn for p in train}
    held = {p.id for _, held in drawn for p in held}
    assert not trained & held
    # Nearly all of the 1000 problems there are have been seen on one side or the other.
    assert len(trained | held) > 950


def test_draw_is_a_function_of_the_seed() -> None:
    wanted = Wanted("addition", 50, 10, 4)
    assert draw(wanted, 0.1, 3) == draw(wanted, 0.1, 3)
    assert draw(wanted, 0.1, 3) != draw(wanted, 0.1, 4)


def test_draw_of_nothing() -> None:
    assert draw(Wanted("addition", 0, 0, 4), 0.1, 0) == ([], [])


@pytest.mark.parametrize(
    ("family", "size"), [("addition", 1), ("addition", 13), ("sorting", 1), ("reversal", 25)]
)
def test_size_out_of_range(family: str, size: int) -> None:
    low, high = FAMILIES[family].sizes
    with pytest.raises(HeadwaterError, match=rf"family {family}: size {size} is outside {low} to {high}"):
        draw(Wanted(family, 1, 0, size), 0.1, 0)


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(HeadwaterError, match=r"'sortin'; did you mean sorting"):
        draw(Wanted("sortin", 1, 0, 4), 0.1, 0)


def test_a_share_that_leaves_one_side_empty_is_named() -> None:
    with pytest.raises(HeadwaterError, match=r"0 of 50 held-out problems found\. A held_out_share of 0 "):
        draw(Wanted("addition", 10, 50, 6), 0.0, 0)


def test_more_problems_than_there_are() -> None:
    with pytest.raises(
        HeadwaterError, match=r"sorting: 94 of 95 and 0 of 0 .*Size 2 has too few different ones"
    ):
        draw(Wanted("sorting", 95, 0, 2), 0.1, 0)


def test_rows_choose_form_by_problem_and_seed() -> None:
    problems, _ = draw(Wanted("sorting", 400, 0, 5), 0.1, 0)
    made = rows(problems, direct_share=0.25, system_share=0.5, seed=1)
    assert [row["id"] for row in made] == [p.id for p in problems]
    direct = [row for row in made if not row["thought"]]
    asked = [row for row in made if row["system"]]
    assert 60 < len(direct) < 140
    assert 100 < len(asked) < 200
    assert all(row["thought"] and row["system"] == SYSTEM for row in asked)
    assert all(row["answer"] == f"\\boxed{{{row['expected']}}}" for row in made)
    # Neither order nor company changes what becomes of a problem; the seed does.
    assert rows(problems[::-1][:7], 0.25, 0.5, 1) == made[::-1][:7]
    assert rows(problems, 0.25, 0.5, 2) != made
    assert rows(problems, 0.0, 1.0, 1) == [
        {**row, "thought": p.thought, "system": SYSTEM} for row, p in zip(made, problems, strict=True)
    ]


def test_rows_of_a_family_without_thoughts_never_ask_for_one() -> None:
    problems, _ = draw(Wanted("passkey", 20, 0, 50), 0.1, 0)
    assert {row["system"] for row in rows(problems, 0.0, 1.0, 0)} == {""}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[list[dict[str, str]]], Path]:
    def save(records: list[dict[str, str]]) -> Path:
        write(tmp_path / "set.parquet", records)
        return tmp_path / "set.parquet"

    return save


Save = Callable[[list[dict[str, str]]], Path]
MIXED = [
    Problem("sorting", "Sort 21.", "2 1\n1 2", "12"),
    Problem("passkey", "The pass key is 1. What?", "", "1"),
    Problem("sorting", "Sort 43.", "4 3\n3 4", "34"),
]


def test_read_gives_back_what_was_written(saved: Save) -> None:
    path = saved(rows(MIXED, 0.0, 0.0, 0))
    assert read(path) == MIXED
    assert read(path, ["passkey"]) == [MIXED[1]]
    assert read(path, ["passkey", "sorting"]) == MIXED


def test_written_bytes_depend_on_the_rows_alone(saved: Save, tmp_path: Path) -> None:
    path = saved(rows(MIXED, 0.0, 0.0, 0))
    first = path.read_bytes()
    problem_sets.write(tmp_path / "other.parquet", rows(MIXED, 0.0, 0.0, 0))
    assert (tmp_path / "other.parquet").read_bytes() == first


def test_read_names_a_family_that_is_not_there(saved: Save) -> None:
    path = saved(rows(MIXED, 0.0, 0.0, 0))
    with pytest.raises(HeadwaterError, match=r"no problem of family 'sortings'; did you mean sorting"):
        read(path, ["passkey", "sortings"])


def test_read_of_an_empty_set(saved: Save) -> None:
    with pytest.raises(HeadwaterError, match=r"no problem at all: ask the tasks stage"):
        read(saved([]))


def test_read_of_what_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "set.parquet").write_bytes(b"not parquet")
    with pytest.raises(HeadwaterError, match=r"set\.parquet is not a readable set of problems"):
        read(tmp_path / "set.parquet")
    with pytest.raises(HeadwaterError, match=r"missing\.parquet is not a readable"):
        read(tmp_path / "missing.parquet")


def test_read_asked_leaves_out_what_is_answered_at_once(saved: Save) -> None:
    path = saved(rows(MIXED, 0.0, 0.0, 0))
    assert read_asked(path) == [MIXED[0], MIXED[2]]
    assert read_asked(path, ["passkey"]) == [MIXED[1]]


def test_read_asked_without_any_worked_solution(saved: Save) -> None:
    with pytest.raises(HeadwaterError, match=r"no problem with a worked solution; name the families"):
        read_asked(saved(rows(MIXED[1:2], 0.0, 0.0, 0)))


def test_spread() -> None:
    assert spread(MIXED, ["sorting", "passkey"], 4) == {
        "sorting": [MIXED[0], MIXED[2]],
        "passkey": [MIXED[1]],
    }
    # Fewer than families: still one each, or a family would silently go unasked.
    assert spread(MIXED, ["sorting", "passkey"], 1) == {"sorting": [MIXED[0]], "passkey": [MIXED[1]]}
