"""Gates: sums of figures against bounds, and nothing evaluated."""

from __future__ import annotations

import pytest

from flows.gates import judge, read_gates, read_promotion
from infra.errors import ConfigError

FIGURES = {("a", "x"): 0.75, ("b", "x"): 0.5, ("a", "deep.name"): 3.0}


def figure(node: str, metric: str) -> float:
    if (node, metric) not in FIGURES:
        raise ConfigError(f"{node} has no figure {metric!r}")
    return FIGURES[node, metric]


@pytest.mark.parametrize(
    ("text", "value"), [("a.x", 0.75), ("a.x - b.x", 0.25), ("a.x - b.x + a.deep.name", 3.25)]
)
def test_values(text: str, value: float) -> None:
    (gate,) = read_gates([{"value": text, "at_least": 0}], {"a", "b"}, "gates")
    assert gate.measure(figure) == pytest.approx(value)


def test_bounds_hold_on_both_sides_and_never_for_nan() -> None:
    (gate,) = read_gates([{"value": "a.x", "at_least": 0.5, "at_most": 0.8}], {"a"}, "gates")
    assert gate.bound == "at least 0.5 and at most 0.8"
    assert gate.holds(0.5)
    assert gate.holds(0.8)
    assert not gate.holds(0.81)
    assert not gate.holds(0.49)
    assert not gate.holds(float("nan"))


def test_a_missing_figure_fails_the_gate_and_says_why() -> None:
    (gate,) = read_gates([{"name": "n", "value": "a.y", "at_least": 0}], {"a"}, "gates")
    verdict = judge(gate, figure)
    assert not verdict.holds
    assert verdict.value is None
    assert "no figure 'y'" in verdict.problem


@pytest.mark.parametrize("text", ["a.x-b.x", "__import__('os').x", "a.x * b.x", "c.x", ".x", "a."])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"gates\.0\.value"):
        read_gates([{"value": text, "at_least": 0}], {"a", "b"}, "gates")


def test_a_promotion_takes_the_short_form() -> None:
    promotion = read_promotion(
        {"name": "chat", "node": "b", "gates": [{"node": "a", "metric": "x", "at_least": 0.7}]},
        {"a", "b"},
        "p",
    )
    assert promotion is not None
    assert promotion.gates[0].value == "a.x"
    assert judge(promotion.gates[0], figure).holds
