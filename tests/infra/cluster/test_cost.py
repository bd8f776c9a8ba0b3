"""Hours and dollars: report table 1, R1's costs, and sums that say what is in them."""

import pytest

from infra.cluster.cost import (
    PUBLISHED_PRICE,
    R1_PUBLISHED,
    V3_PUBLISHED,
    Bill,
    Phase,
    days,
    of_rate,
    of_steps,
)
from infra.cluster.origin import Origin
from infra.errors import ConfigError


def test_table_1_of_the_report():
    bill = Bill(V3_PUBLISHED, PUBLISHED_PRICE)
    assert [phase.gpu_hours for phase in bill.phases] == pytest.approx([2664e3, 119e3, 5e3])
    assert [round(bill.dollars(phase) / 1e6, 3) for phase in bill.phases] == [5.328, 0.238, 0.01]
    assert bill.total().gpu_hours == pytest.approx(2788e3)
    assert bill.total().dollars == pytest.approx(5.576e6)
    assert bill.total().label == "published input"


def test_costs_of_r1():
    total = Bill(R1_PUBLISHED, PUBLISHED_PRICE).total()
    assert (total.gpu_hours, total.dollars) == (147e3, 294e3)
    zero, _, r1 = R1_PUBLISHED
    assert zero.gpu_hours == pytest.approx(512 * 198, rel=5e-3)
    assert r1.gpu_hours == pytest.approx(512 * 80, rel=5e-3)


def test_hours_from_the_published_step():
    """62.9M tokens in 19.926 s on 2048 GPUs: within 1 % of 180K GPU-hours a trillion, 3.7 days."""
    trillion = of_steps("a trillion", 1e12, 15360 * 4096, 19.926, 2048, Origin.REPLAYED)
    assert trillion.gpu_hours == pytest.approx(1e12 / 62_914_560 * 19.926 * 2048 / 3600)
    assert trillion.gpu_hours == pytest.approx(180e3, rel=0.01)
    assert days(trillion.gpu_hours, 2048) == pytest.approx(3.7, abs=0.05)
    assert days(2788e3, 2048) < 60


def test_sums_say_what_they_mix():
    predicted = of_steps("pretraining", 14.8e12, 15360 * 4096, 20.0, 2048, Origin.PREDICTED)
    bill = Bill((predicted, *V3_PUBLISHED[1:]), 2.0)
    assert bill.total().label == "predicted + published input"
    assert bill.total().origins == (Origin.PREDICTED, Origin.PUBLISHED)
    assert bill.total().gpu_hours == pytest.approx(predicted.gpu_hours + 124e3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase("a", -1.0, Origin.PREDICTED), "gpu_hours"),
        (lambda: Phase("a", 1.0, "guessed"), "one of predicted, replayed, published input"),
        (lambda: of_steps("a", 1e12, 0, 1.0, 1, Origin.PREDICTED), "tokens_a_step"),
        (lambda: of_steps("a", 1e12, 1, float("nan"), 1, Origin.PREDICTED), "step_seconds"),
        (lambda: of_rate("a", float("nan"), 1.0, Origin.PREDICTED), "gpu_hours"),
        (lambda: Bill((), 2.0), "at least one"),
        (lambda: Bill(V3_PUBLISHED, -2.0), "dollars_an_hour"),
        (lambda: Bill(V3_PUBLISHED + V3_PUBLISHED[:1], 2.0), "pretraining appear twice"),
        (lambda: days(1.0, 0), "gpus"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
