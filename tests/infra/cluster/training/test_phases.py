"""Phases of a run: the report's context extension, and batches that do not fill a pipeline."""

from dataclasses import replace

import pytest

from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES
from infra.cluster.training.layout import Layout
from infra.cluster.training.levers import fit
from infra.cluster.training.phases import TrainingPhase, phase_layouts, predict_phase
from infra.cluster.training.step import live, predict
from infra.errors import ConfigError
from tests.infra.cluster.training.test_operators import SMALL
from tests.infra.cluster.training.test_step import PRETRAINING, SINGLE

H800 = MACHINES["h800"]
REPORT = Layout()
TOKENS = 1000 * 62_914_560
"""A thousand steps each (report §4.3)."""
TO_32K = TrainingPhase("32K", TOKENS, 32768, 1920)
TO_128K = TrainingPhase("128K", TOKENS, 131072, 480)


def options(phase: TrainingPhase) -> tuple[Layout, ...]:
    return phase_layouts(DEEPSEEK_V3, REPORT, phase, H800)


def laid(phase: TrainingPhase) -> Layout:
    """The first that can run: the phase's own rows a micro-batch, and the fewest GPUs to them."""
    return options(phase)[0]


def test_pretraining_keeps_the_layout_of_the_run():
    assert laid(PRETRAINING) == REPORT
    (small, *_) = phase_layouts(
        SMALL,
        SINGLE,
        TrainingPhase("one", 1e6, 64, 8, 2, SINGLE.precision, SINGLE.moments, SINGLE.recompute),
        H800,
    )
    assert small == SINGLE


@pytest.mark.parametrize(("phase", "tensor"), [(TO_32K, 4), (TO_128K, 16)])
def test_as_few_gpus_share_a_row_as_fill_the_pipeline(phase, tensor):
    found = laid(phase)
    assert (found.tensor, found.length, found.global_batch) == (tensor, phase.length, phase.global_batch)
    # DualPipe wants 32 micro-batches: half as many GPUs a row would leave 30, or an odd number.
    assert found.micro_batches == 60
    assert found.step_tokens == 62_914_560
    with pytest.raises(ConfigError):
        replace(REPORT, length=phase.length, global_batch=phase.global_batch, tensor=tensor // 2)


def test_two_gpus_share_a_row_where_two_are_enough():
    found = laid(TrainingPhase("half", 1e9, 8192, 2560))
    assert (found.tensor, found.micro_batches) == (2, 40)


def test_of_the_layouts_that_fit_the_fastest_is_taken():
    for phase in (TO_32K, TO_128K):
        candidates = options(phase)
        taken = {each: fit(DEEPSEEK_V3, each, H800.memory, live(DEEPSEEK_V3)) for each in candidates}
        seconds = {each: predict(DEEPSEEK_V3, each, H800).seconds for each in candidates if taken[each].fits}
        step, found = predict_phase(DEEPSEEK_V3, REPORT, phase, H800)
        assert found.fits
        assert step.seconds == min(seconds.values())
        # The fewest GPUs a row that can run do not fit: they hold too many tokens.
        assert not taken[candidates[0]].fits


def test_the_one_nearest_to_fitting_where_none_does():
    step, found = predict_phase(DEEPSEEK_V3, REPORT, TO_128K, replace(H800, memory=1e9))
    assert not found.fits
    assert "full" in step.layout.recompute


def test_context_extension_takes_what_was_published_within_15_percent():
    """119K GPU-hours for both (report table 1); 123K here."""
    plans = [predict_phase(DEEPSEEK_V3, REPORT, phase, H800)[0] for phase in (TO_32K, TO_128K)]
    hours = sum(plan.gpu_hours(TOKENS) for plan in plans)
    assert hours == pytest.approx(123.3e3, rel=0.01)
    assert abs(hours / 119e3 - 1) < 0.15
    # Attention over rows of four times the length: the second phase is far longer.
    assert plans[1].seconds > 2 * plans[0].seconds


def test_rows_a_micro_batch_where_there_are_enough():
    many = TrainingPhase("many", 1e9, 4096, 15360, micro_batch=2)
    assert (laid(many).micro_batch, laid(many).tensor) == (2, 1)
    # Two rows at a time on each of 128 ranks are 16 micro-batches of the 32 that DualPipe wants: either two
    # GPUs share them, or they are run one by one.
    few = TrainingPhase("few", 1e9, 4096, 128 * 32, micro_batch=2)
    found = {(each.micro_batch, each.tensor): each.micro_batches for each in options(few)}
    assert (2, 1) not in found
    assert found[2, 2] == found[1, 1] == 32


def test_a_batch_that_nothing_makes_fit_is_refused_with_what_was_wrong_first():
    with pytest.raises(ConfigError, match=r"^tiny: layout\.global_batch is 10: .* 128 sequences at a time"):
        laid(TrainingPhase("tiny", 1e6, 4096, 10))
