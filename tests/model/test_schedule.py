"""Schedules at the points that the report gives (section 4.2)."""

from itertools import pairwise

import pytest

from model.schedule import Schedule, cosine

T = 1e12
REPORT = Schedule()


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (0, 0.0),
        (2000 * 3072 * 4096 / 2, 1.1e-4),
        (2000 * 3072 * 4096, 2.2e-4),
        (1 * T, 2.2e-4),
        (9.99 * T, 2.2e-4),
        (12.15 * T, 1.21e-4),
        (14.3 * T, 2.2e-5),
        (14.5 * T, 2.2e-5),
        (14.65 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate(tokens, lr):
    assert 2.2e-4 * REPORT.lr_scale(tokens) == pytest.approx(lr, rel=1e-6)


def test_the_learning_rate_never_jumps_up():
    scales = [REPORT.lr_scale(REPORT.warmup + i * (REPORT.total - REPORT.warmup) / 5000) for i in range(5001)]
    assert all(later <= earlier for earlier, later in pairwise(scales))


def test_batch_size_rises_from_3072_to_15360_sequences():
    sequences = [15360 * REPORT.batch_share(tokens) for tokens in (0, 469e9 / 2, 469e9, 14 * T)]
    assert sequences == pytest.approx([3072, 9216, 15360, 15360])


def test_bias_speed_and_multi_token_weight():
    assert [REPORT.expert_bias_speed(t * T) for t in (0, 14.29, 14.31)] == [0.001, 0.001, 0.0]
    assert [REPORT.mtp(t * T) for t in (0, 9.99, 10.01, 14.7)] == [0.3, 0.3, 0.1, 0.1]


def test_a_scaled_run_has_the_same_shape():
    total = 2.4e6
    small = Schedule.scaled(total, REPORT.warmup * total / REPORT.total, bias_speed=0.01)
    for tokens in (0, 0.01 * T, 0.2 * T, 5 * T, 11 * T, 13 * T, 14.5 * T, 14.7 * T):
        at = tokens * total / REPORT.total
        assert small.lr_scale(at) == pytest.approx(REPORT.lr_scale(tokens))
        assert small.batch_share(at) == pytest.approx(REPORT.batch_share(tokens))
        assert small.mtp(at) == REPORT.mtp(tokens)
        assert small.expert_bias_speed(at) == pytest.approx(10 * REPORT.expert_bias_speed(tokens))
    assert small.total == total


def test_fine_tuning_rises_and_falls_to_its_floor():
    values = [cosine(step, 100, 10, 0.2) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.6)
    assert values[100] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(values[10:]))
    assert cosine(200, 100, 10, 0.2) == pytest.approx(0.2)
    assert cosine(0, 1, 0, 0.2) == 1.0
