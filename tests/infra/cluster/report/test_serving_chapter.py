"""The chapters of serving: units that cannot be, GPUs without FP8, models too small for a roofline."""

from dataclasses import replace

import pytest

from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES, Machine
from infra.cluster.plan import Request
from infra.cluster.report.chapter import Chapter
from infra.cluster.report.serving import serving_chapter
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.overlap import overlap_decode
from infra.cluster.serving.speculation import speculate
from infra.cluster.training.layout import Layout
from infra.cluster.training.phases import TrainingPhase
from model.config import ModelConfig
from tests.infra.cluster.serving.units import DECODE_PRODUCTION, DECODE_REPORT, PREFILL_REPORT
from tests.model.tiny import TINY

H800 = MACHINES["h800"]
NAMES = ["roofline", "Speculative", "apart", "experts go"]


def told(
    prefill: Deployment | None = PREFILL_REPORT,
    decode: Deployment | None = DECODE_REPORT,
    machine: Machine = H800,
    shape: ModelConfig | None = None,
) -> list[Chapter]:
    """The chapters of a model that is not the published one, so that these are all."""
    shape = shape or replace(DEEPSEEK_V3, vocab_size=129_281)
    phases = (TrainingPhase("pretraining", 1e9, 4096, 15360),)
    return serving_chapter(Request("", "", shape, Layout(), machine, phases, prefill=prefill, decode=decode))


def test_four_chapters_that_can_be():
    chapters = told()
    assert all(name in chapter.title for name, chapter in zip(NAMES, chapters, strict=True))
    assert all(chapter.tables or chapter.rows for chapter in chapters)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel": 3}, "cluster.decode.tensor is 3, which does not divide the 320 GPUs; 2 does"),
        ({"gpus": 8}, "cluster.decode.slots is 1: 8 GPUs have 8 slots for 257 experts; 33 would do"),
    ],
)
def test_a_decode_unit_that_cannot_be_is_said_once_a_chapter(changes, said):
    chapters = told(decode=replace(DECODE_REPORT, **changes))
    for chapter in chapters[:3]:
        assert (chapter.notes, chapter.tables, chapter.rows) == ((said,), (), ())
    assert chapters[3].tables


def test_a_prefill_unit_that_cannot_be_leaves_decoding():
    said = "cluster.prefill.slots is 1: 32 GPUs have 32 slots for 256 experts; 8 would do"
    chapters = told(prefill=replace(PREFILL_REPORT, slots_per_gpu=1))
    assert [chapter.notes == (said,) for chapter in chapters] == [False, False, True, True]
    assert chapters[0].tables
    assert chapters[1].tables


def test_memory_that_is_too_small_names_the_unit():
    few = Deployment("prefill, EP8", 8, tensor_parallel=1, slots_per_gpu=32)
    assert told(prefill=few)[2].notes[0].startswith("cluster.prefill.gpus is 8: ")
    few = replace(few, name="decode, EP8")
    assert told(decode=few)[2].notes[0].startswith("cluster.decode.gpus is 8: ")


def test_a_request_is_served_by_the_faster_step():
    lines = {row[0]: row for row in told()[0].tables[1].rows}
    for batch, row in lines.items():
        step = overlap_decode(replace(DEEPSEEK_V3, vocab_size=129_281), H800, DECODE_REPORT, batch, 4096)
        assert row[-1] == pytest.approx(1 / step.best)
        assert row[-1] * 1e-3 == pytest.approx(1 / min(row[4], row[5]))
    # One batch in one piece at the smallest, two micro-batches at the largest.
    assert lines[1][4] < lines[1][5]
    assert lines[256][4] > lines[256][5]


def test_drafts_are_counted_with_their_all_to_alls():
    chapter = told(decode=DECODE_PRODUCTION)[1]
    found = speculate(
        replace(DEEPSEEK_V3, vocab_size=129_281), H800, DECODE_PRODUCTION, 256, 4096, 0.9, communication=True
    )
    assert chapter.tables[0].rows[-1][-1] == pytest.approx(found.speedup)
    ratio = found.verify / found.plain
    assert any(f"takes {ratio:.2f} times as long" in note for note in chapter.notes)


def test_nodes_are_the_machine_s():
    """A rack of 72 is one node for 32 GPUs: whole groups fit it, so that less is lost than on four nodes."""
    racked = told(machine=MACHINES["gb200-nvl72"])[3].tables[0].rows
    noded = told()[3].tables[0].rows
    assert racked[0][2] < noded[0][2]
    assert racked[1][2] == noded[1][2]


def test_a_gpu_without_fp8_is_said():
    assert any("has no FP8" in note for note in told(machine=replace(H800, fp8=0))[0].notes)
    assert not any("has no FP8" in note for note in told()[0].notes)


def test_a_small_model_is_said_to_be_bound_by_launches():
    unit = Deployment("decode, EP1", 1, tensor_parallel=1, slots_per_gpu=TINY.n_routed_experts)
    notes = told(prefill=None, decode=unit, shape=TINY)[0].notes
    assert any("too small for these bounds" in note for note in notes)
    assert not any("too small for these bounds" in note for note in told()[0].notes)
