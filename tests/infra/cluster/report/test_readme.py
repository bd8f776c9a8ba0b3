"""Figures of the plan that stand in the README files are those that the planner gives."""

from pathlib import Path

import pytest

from infra.cluster import published
from infra.cluster.report.training import steps
from infra.cluster.training.step import StepPlan
from tests.infra.cluster.report import v3

ROOT = Path(__file__).resolve().parents[4]
PLANNER, FRONT = (ROOT / name for name in ("infra/cluster/README.md", "README.md"))


def row(path: Path, name: str) -> list[str]:
    """The cells of a table's row, after its name."""
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    assert len(found) == 1, (path, name)
    return [cell.strip() for cell in found[0].split("|")[2:-1]]


@pytest.fixture(scope="module")
def ways() -> tuple[StepPlan, StepPlan, StepPlan]:
    found = steps(v3.plan().step, True)
    assert found.fitted
    assert found.fitted_even
    return found.fitted, found.fitted_even, found.predicted


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("forward alone", "forward"),
        ("backward alone", "backward"),
        ("weight gradients alone", "weights"),
        ("overlapped pairs", "pair"),
        ("bubble", "bubble"),
        ("optimizer", "optimizer"),
        ("step", "step"),
    ],
)
def test_phases_of_a_step(ways, name, field):
    told = [getattr(published.STEP, field), *(getattr(way.phases, field) for way in ways)]
    assert row(PLANNER, name) == [f"{value:.2f}" for value in told]


def test_shares_and_hours(ways):
    for name, causal, known in (
        ("MFU, causal", True, published.MFU_CAUSAL),
        ("MFU, whole square of attention", False, published.MFU_FULL),
    ):
        told = [known.value, *(way.mfu(causal) for way in ways)]
        assert row(PLANNER, name) == [f"{100 * value:.1f}%" for value in told]
    hours = [published.HOURS_A_TRILLION.value, *(way.gpu_hours(1e12) for way in ways)]
    expected = [f"{value / 1e3:.0f}" for value in hours]
    assert row(PLANNER, "thousand GPU-hours a trillion tokens") == expected


def test_the_first_page(ways):
    plan = v3.plan()
    replayed, _, predicted = ways
    both = (replayed, predicted)
    real = published.STEP
    assert row(FRONT, "step, s") == [f"{s:.2f}" for s in (real.step, *(way.seconds for way in both))]
    apart = [f"{100 * (way.seconds / real.step - 1):+.1f}%" for way in both]
    assert row(FRONT, "... from the published") == ["", *apart]
    bubbles = (real.bubble, *(way.phases.bubble for way in both))
    assert row(FRONT, "bubble, s") == [f"{value:.2f}" for value in bubbles]
    shares = (published.MFU_CAUSAL.value, *(way.mfu() for way in both))
    assert row(FRONT, "MFU, causal") == [f"{100 * value:.1f}%" for value in shares]
    hours = [f"{way.gpu_hours(14.8e12) / 1e3:,.0f}" for way in both]
    assert row(FRONT, "thousand GPU-hours of pretraining") == ["2,664", *hours]
    extension = sum(each.step.gpu_hours(each.phase.tokens) for each in plan.extensions if each.step)
    assert row(FRONT, "thousand GPU-hours of context extension") == ["119", "", f"{extension / 1e3:.0f}"]
