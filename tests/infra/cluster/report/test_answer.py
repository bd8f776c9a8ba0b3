"""The plan in short: the figures of its other chapters, in one screen."""

import pytest

from infra.cluster.report.answer import answer_chapter
from tests.infra.cluster.report import v3


def test_the_answers_are_those_of_the_plan():
    plan = v3.plan()
    rows = {row.name: row.ours for row in answer_chapter(plan).rows}
    step = plan.step
    assert [each.phase.name for each in plan.phases] == ["pretraining", "extend_32k", "extend_128k"]
    hours = sum(each.step.gpu_hours(each.phase.tokens) for each in plan.phases)
    assert rows["step"] == step.seconds
    assert rows["GPU-hours of pretraining and extensions"] == pytest.approx(hours)
    assert rows["their cost"] == pytest.approx(2 * hours)
    assert rows["their days"] == pytest.approx(hours / 2048 / 24)
    assert rows["MFU, causal"] == step.mfu()
    assert (rows["GPUs"], rows["tokens of pretraining"]) == (2048, 14.8e12)
    spare = rows["memory that a GPU has"] - rows["memory taken on the fullest GPU"]
    assert spare == pytest.approx(plan.fit.spare / 2**30)


def test_the_parts_of_a_step_are_all_of_it():
    plan = v3.plan()
    chapter = answer_chapter(plan)
    (table,) = chapter.tables
    assert sum(seconds for _, seconds, _ in table.rows) == pytest.approx(plan.step.seconds)
    assert sum(float(share.rstrip("%")) for *_, share in table.rows) == pytest.approx(100, abs=0.3)
    assert chapter.notes[0].startswith("It fits: rank ")
    assert chapter.drawing.startswith("<svg")


def test_what_the_trainer_cannot_do_yet_and_how_far_the_prediction_is_are_said():
    notes = answer_chapter(v3.plan()).notes
    (today,) = (note for note in notes if "The trainer" in note)
    assert "attention_output and router" in today
    assert "does not fit: rank 1 takes 88.9 GiB of 79.6 GiB" in today
    assert any("-8.6% from the published one" in note for note in notes)
