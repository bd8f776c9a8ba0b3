"""The search for layouts, against every combination tried one by one."""

from dataclasses import replace
from itertools import product

import pytest

from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES
from infra.cluster.training import search as module
from infra.cluster.training.layout import REPORT_RECOMPUTES, Layout
from infra.cluster.training.levers import fit
from infra.cluster.training.search import Space, search
from infra.cluster.training.stages import settled
from infra.cluster.training.step import live, predict
from infra.errors import ConfigError
from tests.infra.cluster.training.test_operators import SMALL

H800 = MACHINES["h800"]
SPACE = Space(gpus=8, length=64, global_batch=32)
DEEPER = replace(SMALL, num_hidden_layers=5)


def tried(shape, space: Space, machine) -> list[Layout]:
    """All that can run, by trying every value there is."""
    found = []
    for pipeline, expert, schedule, micro_batch, again in product(
        range(1, space.gpus + 1),
        range(1, space.gpus + 1),
        ("1f1b", "zb1p", "dualpipe", "dualpipev"),
        (1, 2, 4),
        (REPORT_RECOMPUTES, (), {"full"}),
    ):
        if pipeline == 1 and schedule != "1f1b":  # one stage knows no other order
            continue
        changes = {"schedule": schedule, "micro_batch": micro_batch, "recompute": frozenset(again)}
        try:
            layout = Layout(**space.common, pipeline=pipeline, expert=expert, **changes)
            layout.check(shape, machine.gpus_per_node)
        except ConfigError:
            continue
        found.append(settled(shape, layout))
    return found


@pytest.mark.parametrize("gpus", [1, 2, 6, 8])
def test_every_layout_that_can_run_is_found_and_judged_as_it_would_be_alone(gpus):
    space = replace(SPACE, gpus=gpus, global_batch=12 * gpus)
    candidates = tried(DEEPER, space, H800)
    taken = {layout: fit(DEEPER, layout, H800.memory, live(DEEPER)) for layout in candidates}
    most = {layout: max(rank.total for rank in found.ranks) for layout, found in taken.items()}
    # A card on which about half of them fit.
    card = replace(H800, memory=sorted(most.values())[len(most) // 2])
    found = search(DEEPER, space, card)

    assert {each.layout for each in found.fitting} == {x for x in candidates if most[x] <= card.memory}
    assert {layout for layout, _ in found.others} == {x for x in candidates if most[x] > card.memory}
    assert len(found.fitting) + len(found.others) == len(candidates)
    seconds = [each.step.seconds for each in found.fitting]
    assert seconds == sorted(seconds)
    for each in found.fitting:
        assert each.fit.fits
        assert each.step.seconds == predict(DEEPER, each.layout, card).seconds
    # What is missing is told as far as it was counted: never more than it is.
    spare = [found.spare for _, found in found.others]
    assert spare == sorted(spare, reverse=True)
    for layout, short in found.others:
        assert 0 < -short.spare <= most[layout] - card.memory


def test_a_reason_says_where_time_and_memory_go():
    (first, *_) = search(DEEPER, SPACE, H800).fitting
    assert "bubble" in first.reason
    assert "optimizer" in first.reason
    assert "GiB of 79.6 GiB" in first.reason


def test_what_fits_nowhere_is_still_told():
    card = replace(H800, memory=1.0)
    found = search(DEEPER, replace(SPACE, gpus=2), card)
    assert not found.fitting
    assert found.others


REPORTED = Layout()
RIVALS = (
    replace(REPORTED, schedule="zb1p", expert=16),
    replace(REPORTED, schedule="1f1b", expert=16),
    replace(REPORTED, recompute=frozenset({"full"})),
    replace(REPORTED, expert=8),
    replace(REPORTED, micro_batch=2),
)
REPORT_SPACE = Space(gpus=2048, length=4096, global_batch=15360)


def test_the_reports_own_layout_comes_first_of_those_near_it(monkeypatch):
    monkeypatch.setattr(module, "layouts", lambda *_: iter((*RIVALS, REPORTED)))
    found = search(DEEPSEEK_V3, REPORT_SPACE, H800)
    assert found.fitting[0].layout == REPORTED
    # Fewer GPUs to an expert, or larger micro-batches, take more memory than there is.
    assert {layout for layout, _ in found.others} == {RIVALS[3], RIVALS[4]}


@pytest.mark.slow
def test_the_reports_own_layout_comes_first_of_all_beside_its_twin_on_half_the_devices():
    found = search(DEEPSEEK_V3, REPORT_SPACE, H800)
    first, second = (replace(each.layout, layers=()) for each in found.fitting[:2])
    assert {first, second} == {REPORTED, replace(REPORTED, schedule="dualpipev", pipeline=8)}
    assert found.fitting[2].step.seconds > 1.05 * found.fitting[1].step.seconds
