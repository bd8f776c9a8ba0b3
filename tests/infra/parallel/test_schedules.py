"""The four schedules: proved right over ranks and micro-batches, told as published, refused with reason."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from infra.parallel.actions import PAIR, Action, Pair, Schedule, kind
from infra.parallel.check import ScheduleError, check
from infra.parallel.order import Deadlock
from infra.parallel.schedules import METHODS, build

FIGURE = [
    "F0 F1 F2 F3 F4 F5 F6 F0' I0' W0' F1' I1' W1' F2' I2' W2' F3' F7&B3' F4'&B0 F8&B4' F5'&B1 F9&B5' F6'&B2 "
    "B6' F7'&B3 B7' F8'&B4 B8' F9'&B5 B9' I6 W6 I7 W7 I8 W8 I9 W9",
    "F0 F1 F2 F3 F4 F0' F5 F1' I0' W0' F2' I1' W1' F3' F6&B2' F4'&B0 F7&B3' F5'&B1 F8&B4' F6'&B2 F9&B5' "
    "F7'&B3 B6' F8'&B4 B7' F9'&B5 B8' B6 I9' I7 W9' I8 W7 I9 W8 W9",
    "F0 F1 F2 F0' F3 F1' F4 F2' I0' W0' F3' F5&B1' F4'&B0 F6&B2' F5'&B1 F7&B3' F6'&B2 F8&B4' F7'&B3 F9&B5' "
    "F8'&B4 B6' F9'&B5 B7' B6 B8' I7 I9' I8 W7 I9 W9' W8 W9",
    "F0 F0' F1 F1' F2 F2' F3 F3' F4 B0' F4'&B0 F5&B1' F5'&B1 F6&B2' F6'&B2 F7&B3' F7'&B3 F8&B4' F8'&B4 "
    "F9&B5' F9'&B5 B6' B6 B7' B7 I8' I8 I9' I9 W8' W8 W9' W9",
]
"""Read off the figure of DualPipe's README by hand: 4 ranks, 8 stages, 10 micro-batches, ' on the way back.

The upper half of the report's Figure 5 is the same with ' for the micro-batches of the other direction."""


def written(schedule: Schedule, rank: int, near: int, micros: int) -> str:
    """A program in the figure's words, ' where the stage is not `near`."""

    def told(action: Action) -> str:
        return f"{action.kind}{action.micro % micros}" + ("" if action.stage == near else "'")

    return " ".join(
        f"{told(step.forward)}&{told(step.backward)}" if isinstance(step, Pair) else told(step)
        for step in schedule.programs[rank]
    )


@st.composite
def sizes(draw: st.DrawFn) -> tuple[str, int, int]:
    """(method, stages, micro-batches) that a method is published for."""
    name = draw(st.sampled_from(["1f1b", "zb1p", "dualpipe", "dualpipev"]))
    if name in ("1f1b", "zb1p"):
        return name, draw(st.integers(1, 9)), draw(st.integers(1, 24))
    stages = 2 * draw(st.integers(1, 6))
    if name == "dualpipev":
        return name, stages, stages + draw(st.integers(0, 17))
    return name, stages, 2 * (stages + draw(st.integers(0, 9)))


@given(sizes())
@settings(max_examples=150, deadline=None)
def test_every_schedule_is_one(size):
    name, stages, micro_batches = size
    schedule = build(name, stages, micro_batches)
    check(schedule)
    assert (schedule.name, schedule.stages, schedule.micro_batches) == size
    assert schedule.ranks == (stages // 2 if name == "dualpipev" else stages)
    work = {sum(2 if kind(step) == PAIR else 1 for step in row if kind(step) != "W")
            for row in schedule.programs}  # fmt: skip
    assert work == {2 * micro_batches * stages // schedule.ranks}


def test_dualpipev_is_the_published_figure():
    schedule = build("dualpipev", 8, 10)
    assert [written(schedule, rank, near=rank, micros=10) for rank in range(4)] == FIGURE


def test_dualpipe_is_figure_5():
    """Both halves: the lower ranks run the upper ranks' programs with the directions exchanged."""
    schedule = build("dualpipe", 8, 20)
    upper = [written(schedule, rank, near=rank, micros=10) for rank in range(4)]
    lower = [written(schedule, 7 - rank, near=rank, micros=10) for rank in range(4)]
    assert upper == lower == FIGURE
    for rank in range(8):
        for step in schedule.programs[rank]:
            for action in (step.forward, step.backward) if isinstance(step, Pair) else (step,):
                assert rank == (action.stage if action.micro < 10 else 7 - action.stage)


def test_1f1b_and_zb1p_of_a_middle_stage():
    assert written(build("1f1b", 4, 5), 1, near=1, micros=5) == "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4"
    assert written(build("zb1p", 4, 5), 1, near=1, micros=5) == "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 I3 W2 I4 W3 W4"


@pytest.mark.parametrize(
    ("name", "copies", "held"),
    [("1f1b", 1, (2,)), ("zb1p", 1, (2,)), ("dualpipe", 2, (2, 5)), ("dualpipev", 1, (2, 5))],
)
def test_parameters_are_held_as_in_table_2(name, copies, held):
    schedule = build(name, 8, 20)
    assert schedule.copies == copies
    assert schedule.held[2] == held


@pytest.mark.parametrize(
    ("name", "stages", "micro_batches", "says"),
    [
        ("1f1b", 0, 4, "stages: 1f1b needs 1 or more, got 0; use 1"),
        ("zb1p", 4, 0, "micro_batches: zb1p needs 1 or more, got 0; use 1"),
        ("dualpipe", 7, 40, "stages: dualpipe needs a multiple of 2, got 7; use 6 or 8"),
        ("dualpipe", 8, 21, "micro_batches: dualpipe needs a multiple of 2, got 21; use 20 or 22"),
        ("dualpipe", 8, 14, "2 micro-batches a stage or more, got 14; use at least 16"),
        ("dualpipev", 1, 40, "stages: dualpipev needs a multiple of 2, got 1; use 2"),
        ("dualpipev", 8, 7, "1 micro-batches a stage or more, got 7; use at least 8"),
        ("dualpip", 8, 20, "no pipeline schedule is called 'dualpip'; did you mean dualpipe"),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_the_nearest_it_can(name, stages, micro_batches, says):
    with pytest.raises(ConfigError, match=r"(?s).") as refused:
        build(name, stages, micro_batches)
    assert says in str(refused.value)


def changed(schedule: Schedule, rank: int, program: list) -> Schedule:
    programs = list(schedule.programs)
    programs[rank] = tuple(program)
    return dataclasses.replace(schedule, programs=tuple(programs))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_step_left_out_or_done_twice_is_seen(data):
    schedule = build(data.draw(st.sampled_from(sorted(METHODS))), 4, 8)
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    program = list(schedule.programs[rank])
    at = data.draw(st.integers(0, len(program) - 1))
    with pytest.raises(ScheduleError, match="it needs one F"):
        check(changed(schedule, rank, program[:at] + program[at + 1 :]))
    with pytest.raises(ScheduleError, match="it needs one F"):
        check(changed(schedule, rank, [*program[: at + 1], *program[at:]]))


def test_what_stands_on_the_wrong_rank_is_seen():
    schedule = build("dualpipe", 4, 8)
    swapped = dataclasses.replace(schedule, programs=schedule.programs[::-1])
    with pytest.raises(ScheduleError, match="stands on rank 0, its stage lives on 3"):
        check(swapped)
    with pytest.raises(ScheduleError, match="there are 4 stages and 8 micro-batches"):
        check(changed(schedule, 0, [Action("F", 4, 0)]))


def test_ranks_that_wait_for_one_another_are_named():
    first, second = build("1f1b", 2, 2).programs
    schedule = build("1f1b", 2, 2)
    late = changed(schedule, 0, [first[0], first[2], first[1], first[3]])
    check(late)
    with pytest.raises(Deadlock, match="rank 0 waits before `B stage=0 micro=1` for F of stage 0"):
        check(changed(schedule, 0, [first[0], first[3], first[1], first[2]]))
    with pytest.raises(Deadlock, match="2 ranks cannot go on"):
        check(changed(schedule, 1, [second[2], second[1], second[0], second[3]]))


def test_weights_before_inputs_is_seen():
    schedule = build("zb1p", 2, 2)
    program = list(schedule.programs[0])
    inputs, weights = program.index(Action("I", 0, 0)), program.index(Action("W", 0, 0))
    program[inputs], program[weights] = program[weights], program[inputs]
    with pytest.raises(Deadlock, match="waits before `W stage=0 micro=0` for I of stage 0"):
        check(changed(schedule, 0, program))


def test_words_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="one of F, B, I, W, got 'X'"):
        Action("X", 0, 0)
    with pytest.raises(ConfigError, match="a pair overlaps F with B"):
        Pair(Action("F", 0, 0), Action("I", 1, 0))
    schedule = build("dualpipe", 4, 8)
    with pytest.raises(ConfigError, match="homes: every direction"):
        dataclasses.replace(schedule, stages=5)
    with pytest.raises(ConfigError, match="cannot be shared out over 2 directions"):
        dataclasses.replace(schedule, micro_batches=9)
    with pytest.raises(ConfigError, match="ranks 0 to 3"):
        dataclasses.replace(schedule, homes=((0, 1, 2, 2),))
