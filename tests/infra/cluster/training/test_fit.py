"""Times fitted to published phases: a replay's sums are the phases again, whatever the stages are like."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.cluster import published
from infra.cluster.pipeline.replay import replay
from infra.cluster.pipeline.times import Duration, StageTimes
from infra.cluster.published import Phases
from infra.cluster.training.fit import fitted, mean_phases
from infra.errors import ConfigError
from infra.parallel.schedules import build

KINDS = ("forward", "backward", "weights", "pair")


def phases(forward: float, backward: float, weights: float, pair: float) -> Phases:
    """Phases whose bubble and step are no numbers: nothing may be made of them."""
    return Phases(forward, backward, weights, pair, bubble=float("nan"), optimizer=0.3, step=float("nan"))


@st.composite
def uneven(draw, stages: int) -> StageTimes:
    """Stages of any durations, parts of them exposed."""

    def row(count: int) -> tuple[Duration, ...]:
        seconds = draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
        shares = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
        return tuple(Duration(whole, whole * share) for whole, share in zip(seconds, shares, strict=True))

    between = [(i, j) for i in range(stages) for j in range(stages)]
    pairs = dict(zip(between, row(len(between)), strict=True))
    return StageTimes(row(stages), row(stages), row(stages), pairs=pairs)


def test_the_published_phases_come_back_and_the_bubble_comes_out():
    schedule = build("dualpipe", 16, 120)
    times = fitted(schedule, StageTimes.uniform(16, 1, 1, 1, pair=3), published.STEP)
    found = mean_phases(replay(schedule, times), published.STEP.optimizer)
    for name in KINDS:
        assert getattr(found, name) == pytest.approx(getattr(published.STEP, name), rel=1e-12)
    assert found.optimizer == published.STEP.optimizer
    # A bubble with equal stages, of the same size as the published 2.06 s without having been told.
    assert 0.8 < found.bubble < published.STEP.bubble
    whole = sum(getattr(found, name) for name in KINDS) + found.bubble + found.optimizer
    assert found.step == pytest.approx(whole)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), stages=st.sampled_from([2, 4, 6]), more=st.integers(0, 3))
def test_any_stages_come_to_the_same_sums(data, stages, more):
    schedule = build("dualpipe", stages, 2 * stages + 2 * more)
    shape = data.draw(uneven(stages))
    # Weight gradients so short that those inside whole backward passes, which are longer than the others by
    # as much as stages differ (100 times at most), leave something of these.
    forward, backward, pair = (data.draw(st.floats(1, 20)) for _ in range(3))
    given = phases(forward, backward, data.draw(st.floats(1e-5, 1e-4)), pair)
    times = fitted(schedule, shape, given)
    found = mean_phases(replay(schedule, times), given.optimizer)
    for name in KINDS:
        assert getattr(found, name) == pytest.approx(getattr(given, name), rel=1e-9)
    # Stages keep their likeness, and what is exposed its share.
    for kind in ("forward", "inputs", "weights"):
        for one, other in zip(getattr(shape, kind), getattr(times, kind), strict=True):
            factor = getattr(times, kind)[0].seconds / getattr(shape, kind)[0].seconds
            assert other.seconds == pytest.approx(factor * one.seconds)
            assert other.exposed == pytest.approx(factor * one.exposed)


@pytest.mark.parametrize("name", ["dualpipev", "zb1p", "1f1b"])
def test_every_schedule_comes_to_its_sums(name):
    schedule = build(name, 4, 12)
    split, paired = name != "1f1b", name == "dualpipev"
    given = phases(3.0, 8.0, 1.0 if split else 0.0, 9.0 if paired else 0.0)
    alike = StageTimes.uniform(4, 1, 2, 1, pair=4 if paired else None)
    found = mean_phases(replay(schedule, fitted(schedule, alike, given)), 0.0)
    for kind in KINDS:
        assert getattr(found, kind) == pytest.approx(getattr(given, kind))


def test_whole_backward_passes_share_their_time_as_the_stages_say():
    schedule = build("1f1b", 2, 4)
    times = fitted(schedule, StageTimes.uniform(2, 1, 2, 1), phases(4.0, 12.0, 0.0, 0.0))
    assert times.forward[0].seconds == pytest.approx(1.0)
    assert times.inputs[0].seconds == pytest.approx(2.0)
    assert times.weights[0].seconds == pytest.approx(1.0)
    assert times.backward[0].seconds == pytest.approx(3.0)


def test_phases_that_a_schedule_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"1f1b has no W passes to spread 1\.0 s over"):
        fitted(build("1f1b", 4, 8), StageTimes.uniform(4, 1, 1, 1), phases(1.0, 2.0, 1.0, 0.0))
    with pytest.raises(ConfigError, match=r"zb1p has no .* passes to spread 3\.0 s over"):
        fitted(build("zb1p", 4, 8), StageTimes.uniform(4, 1, 1, 1), phases(1.0, 2.0, 1.0, 3.0))


def test_more_weight_gradients_than_backward_passes_are_refused():
    with pytest.raises(ConfigError, match=r"backward passes of 0\.1 s leave nothing beside"):
        fitted(
            build("dualpipe", 4, 12),
            StageTimes.uniform(4, 1, 1, 1, pair=3),
            phases(1.0, 0.1, 5.0, 9.0),
        )
