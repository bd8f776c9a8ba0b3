"""A training step of the report's run beside what was published of it, and steps worked out by hand."""

from dataclasses import replace

import pytest

from infra.cluster import published
from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES
from infra.cluster.network.collectives import zero1
from infra.cluster.pipeline.times import StageTimes
from infra.cluster.plan import PlannedPhase
from infra.cluster.report.training import step_chapter, steps
from infra.cluster.training.layout import Layout
from infra.cluster.training.phases import TrainingPhase
from infra.cluster.training.step import live, measured, optimizer_seconds, predict, replayed, schedule
from infra.errors import ConfigError
from tests.infra.cluster.training.test_operators import SMALL

H800 = MACHINES["h800"]
REPORT = Layout()
STEP = published.STEP
PRETRAINING = TrainingPhase("pretraining", 14.8e12, 4096, 15360)
SINGLE = Layout(
    gpus=1,
    pipeline=1,
    expert=1,
    schedule="1f1b",
    micro_batch=2,
    length=64,
    global_batch=8,
    precision="bf16",
    recompute=frozenset(),
)


@pytest.fixture(scope="module")
def predicted():
    return predict(DEEPSEEK_V3, REPORT, H800)


@pytest.fixture(scope="module")
def fitted():
    return replayed(DEEPSEEK_V3, REPORT, H800, STEP)


def apart(ours: float, theirs: float) -> float:
    return ours / theirs - 1


def test_the_predicted_step(predicted):
    """From shapes, schedule and hardware alone: short of the published 19.926 s by less than a tenth."""
    assert predicted.seconds == pytest.approx(18.26, abs=0.05)
    assert -0.10 < apart(predicted.seconds, 19.926) < -0.05
    phases = predicted.phases
    for name in ("forward", "backward", "weights", "pair"):
        assert abs(apart(getattr(phases, name), getattr(STEP, name))) < 0.07
    # No schedule has the waits of unevenly loaded experts: the bubble is the part that is farthest away.
    assert -0.40 < apart(phases.bubble, STEP.bubble) < -0.30


def test_the_replayed_step(fitted):
    """Chunk times fitted to the published phases; schedule and stages leave 1.43 s of the bubble's 2.06 s."""
    assert fitted.seconds == pytest.approx(19.27, abs=0.02)
    assert -0.04 < apart(fitted.seconds, 19.926) < -0.03
    for name in ("forward", "backward", "weights", "pair", "optimizer"):
        assert getattr(fitted.phases, name) == pytest.approx(getattr(STEP, name), rel=1e-9)
    assert fitted.phases.bubble == pytest.approx(1.43, abs=0.01)


def test_equal_stages_leave_less_of_the_bubble(fitted):
    even = replayed(DEEPSEEK_V3, REPORT, H800, STEP, even=True)
    assert even.phases.bubble == pytest.approx(1.01, abs=0.01)
    assert even.seconds - even.phases.bubble == pytest.approx(fitted.seconds - fitted.phases.bubble)


def test_phases_are_the_whole_step(predicted, fitted):
    for plan in (predicted, fitted):
        phases = plan.phases
        parts = ("forward", "backward", "weights", "pair", "bubble", "optimizer")
        assert sum(getattr(phases, name) for name in parts) == pytest.approx(plan.seconds)
        assert phases.step == plan.seconds
        assert 0 < plan.exposed < plan.seconds


def test_what_was_published_of_the_result_is_nowhere_an_input(monkeypatch):
    """The bubble, the step and all that follows from it: nonsense in their place changes nothing of ours."""

    def ours() -> list[tuple[str, float]]:
        plan = predict(DEEPSEEK_V3, REPORT, H800)
        chapter = step_chapter(steps(plan, is_v3=True), [PlannedPhase(PRETRAINING, plan, None)])
        return [(row.name, row.ours) for row in chapter.rows]

    before = ours()
    monkeypatch.setattr(published, "STEP", replace(STEP, bubble=777.0, step=888.0))
    for name in ("MFU_CAUSAL", "MFU_FULL", "TOKENS_A_DAY", "HOURS_A_TRILLION", "TOKENS_A_STEP"):
        monkeypatch.setattr(published, name, published.Published(999.0, "nowhere"))
    assert ours() == before


def test_a_prediction_needs_no_published_figure_at_all(monkeypatch, predicted):
    monkeypatch.setattr(published, "STEP", None)
    assert predict(DEEPSEEK_V3, REPORT, H800).seconds == predicted.seconds


def test_mfu_by_hand(predicted, fitted):
    """250.46 GFLOP a token (281.15 with the whole square) over 2,048 x 989.5 TFLOPS."""
    for plan in (predicted, fitted):
        tokens_a_second = 62_914_560 / plan.seconds
        peak = 2048 * 989.5e12
        assert plan.mfu() == pytest.approx(250.46e9 * tokens_a_second / peak, rel=1e-4)
        assert plan.mfu(causal=False) == pytest.approx(281.15e9 * tokens_a_second / peak, rel=1e-4)
    # By the same formula the published step gives the published MFU.
    assert fitted.mfu() * fitted.seconds / 19.926 == pytest.approx(published.MFU_CAUSAL.value, rel=3e-3)
    assert fitted.mfu(False) * fitted.seconds / 19.926 == pytest.approx(published.MFU_FULL.value, rel=3e-3)


def test_tokens_a_day_and_hours_by_hand(predicted, fitted):
    for plan in (predicted, fitted):
        steps_a_day = 86400 / plan.seconds
        assert plan.tokens_a_day == pytest.approx(15360 * 4096 * steps_a_day)
        assert plan.gpu_hours(1e12) == pytest.approx(2048 * 24 * 1e12 / plan.tokens_a_day)
        assert plan.gpu_hours(14.8e12) == pytest.approx(14.8 * plan.gpu_hours(1e12))
    assert fitted.tokens_a_day * fitted.seconds / 19.926 == pytest.approx(272.80e9, rel=1e-3)
    assert abs(apart(fitted.gpu_hours(1e12), 180e3)) < 0.04
    assert abs(apart(fitted.gpu_hours(14.8e12), 2664e3)) < 0.04
    assert abs(apart(predicted.gpu_hours(14.8e12), 2664e3)) < 0.10


def test_the_optimizer_beside_the_published(predicted):
    assert abs(apart(predicted.optimizer, STEP.optimizer)) < 0.05


def test_uneven_experts_would_close_the_gap():
    """30% more rows on the busiest GPU take the prediction to within 2% of the published step."""
    assert abs(apart(predict(DEEPSEEK_V3, REPORT, H800, 1.3).seconds, 19.926)) < 0.02


def test_an_optimizer_alone_moves_20_bytes_a_parameter():
    """One GPU, nothing to exchange: FP32 gradient, master and two moments in BF16, read and written."""
    elements = 50 * 12  # embedding
    attention = 9 * 12 + 9 + 18 * 9 + 7 * 12 + 5 + 30 * 5 + 12 * 18 + 2 * 12
    dense, router = 3 * 12 * 20, 8 * 12
    experts = 3 * 12 * 7 * (8 + 2)
    elements += 3 * attention + dense + 2 * (router + experts)
    elements += 50 * 12 + 12  # head and last norm
    elements += 2 * (attention + router + experts + 2 * 12 * 12 + 3 * 12)  # MTP modules
    # A stream of reads and writes reaches 0.85 of the memory's bandwidth.
    assert optimizer_seconds(SMALL, SINGLE, H800) == pytest.approx(20 * elements / (0.85 * 3.35e12))
    wide = replace(SINGLE, moments="fp32")
    assert optimizer_seconds(SMALL, wide, H800) == pytest.approx(28 * elements / (0.85 * 3.35e12))


def test_replicas_share_out_the_optimizer_and_exchange():
    """Four replicas each update a quarter; FP32 gradients go to their owners and BF16 weights come back."""
    alone = optimizer_seconds(SMALL, SINGLE, H800)
    shared = replace(SINGLE, gpus=4)
    routed = 4 * 8 * 3 * 12 * 7
    elements = round(alone * 0.85 * 3.35e12 / 20)
    found = zero1(elements - routed, routed, 4, 1, H800)
    away = found.dense.gradients.seconds + found.experts.gradients.seconds
    home = found.dense.gather.seconds + found.experts.gather.seconds
    wide = zero1(elements - routed, routed, 4, 1, H800, parameter_bytes=4).seconds

    def takes(**changes: object) -> float:
        return optimizer_seconds(SMALL, replace(shared, **changes), H800)

    assert takes() == pytest.approx(alone / 4 + away + home)
    # Without ZeRO all replicas add up whole FP32 gradients and update all weights.
    assert takes(zero=0) == pytest.approx(alone + wide)
    # Weights of FP32 come back as such.
    assert takes(precision="fp32") == pytest.approx(alone / 4 + wide)
    # ZeRO 2 sends gradients away in each of the micro-batches, ZeRO 3 gathers weights before both passes.
    assert shared.micro_batches == 1
    assert takes(zero=2, global_batch=24) == pytest.approx(alone / 4 + 3 * away + home)
    assert takes(zero=3, global_batch=24) == pytest.approx(alone / 4 + 3 * away + 6 * home)
    assert takes(zero=1, global_batch=24) == takes()


def test_a_step_of_one_gpu_is_its_micro_batches_one_after_the_other():
    plan = predict(SMALL, SINGLE, H800)
    assert plan.layout.micro_batches == 4
    assert plan.phases.bubble == pytest.approx(0.0, abs=1e-12)
    assert plan.exposed == 0.0
    passes = plan.timeline.rows[0]
    assert len(passes) == 8
    assert plan.seconds == pytest.approx(sum(event.seconds for event in passes) + plan.optimizer)


def test_mfu_of_fp32_is_of_its_own_peak():
    plan = predict(SMALL, replace(SINGLE, precision="fp32"), H800)
    low = predict(SMALL, SINGLE, H800)
    assert plan.mfu() * plan.seconds * 67e12 == pytest.approx(low.mfu() * low.seconds * 989.5e12)


def test_measured_durations_are_replayed_as_they_are():
    layout = replace(SINGLE, gpus=2, pipeline=2)
    plan = measured(SMALL, layout, H800, StageTimes.uniform(2, 1, 1, 1))
    # Four micro-batches of three seconds, and one stage's wait; transfers take microseconds.
    assert plan.timeline.makespan == pytest.approx(4 * 3 + 3, abs=1e-3)
    assert plan.optimizer == optimizer_seconds(SMALL, layout, H800)
    with pytest.raises(ConfigError, match=r"the trace has 3 stages, layout\.pipeline = 2 makes 2"):
        measured(SMALL, layout, H800, StageTimes.uniform(3, 1, 1, 1))


def test_live_micro_batches_come_out_of_the_schedule():
    found = live(DEEPSEEK_V3)(REPORT)
    assert [sum(counts) for counts in found] == [17] * 16
    alone = live(SMALL)(replace(SINGLE, gpus=2, pipeline=2))
    assert alone == [(2,), (1,)]


def test_the_layout_names_its_schedule():
    assert schedule(REPORT).name == "dualpipe"
    assert schedule(REPORT).micro_batches == 120
    assert schedule(replace(REPORT, schedule="dualpipev")).stages == 32


def test_a_layout_that_cannot_run_is_refused():
    wrong, message = replace(REPORT, expert=48), r"layout\.expert is 48.*nearest that fits is 32"
    with pytest.raises(ConfigError, match=message):
        predict(DEEPSEEK_V3, wrong, H800)
    with pytest.raises(ConfigError, match=message):
        replayed(DEEPSEEK_V3, wrong, H800, STEP)
    with pytest.raises(ConfigError, match=message):
        measured(DEEPSEEK_V3, wrong, H800, StageTimes.uniform(16, 1, 1, 1, pair=3))
