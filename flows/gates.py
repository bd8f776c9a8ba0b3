"""Gates: claims about a run's figures, written in the preset, checked and printed; a promotion stands
behind some.

A gate's value is a sum or difference of figures, `node.metric - node.metric`, read by a small parser
(nothing is evaluated as code). A figure is a metric in the record of that node's artifact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from infra.errors import ConfigError, StoreError, nearest
from infra.names import check_name

Figure = Callable[
    [str, str], float
]  # (node, metric) -> value; raises ConfigError when there is no such figure


@dataclass(frozen=True)
class Gate:
    """One claim: the value of `terms` (sign, node, metric) lies within the bounds."""

    name: str
    value: str
    terms: tuple[tuple[int, str, str], ...]
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def bound(self) -> str:
        """The bounds in words."""
        low = [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
        high = [f"at most {self.at_most:g}"] if self.at_most < math.inf else []
        return " and ".join(low + high)

    def measure(self, figure: Figure) -> float:
        """The value of this gate."""
        return sum(sign * figure(node, metric) for sign, node, metric in self.terms)

    def holds(self, value: float) -> bool:
        """Whether a measured value passes (NaN never does)."""
        return self.at_least <= value <= self.at_most


@dataclass(frozen=True)
class Promotion:
    """The name that a run gives to one of its artifacts when all its gates hold."""

    name: str
    node: str
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class Verdict:
    """A gate as it was found; `value` is None, and `problem` says why, when a figure is missing."""

    gate: Gate
    value: float | None
    holds: bool
    problem: str = ""


def judge(gate: Gate, figure: Figure) -> Verdict:
    """Measure a gate; a missing figure is a gate that does not hold, with the reason."""
    try:
        value = gate.measure(figure)
    except ConfigError as error:
        return Verdict(gate, None, False, str(error))
    return Verdict(gate, value, gate.holds(value))


def read_gates(given: Any, nodes: Collection[str], where: str) -> tuple[Gate, ...]:
    """The `gates:` list of a preset, checked."""
    if given is None:
        return ()
    if not isinstance(given, list):
        raise ConfigError(f"{where}: expected a list of gates, got {given!r}")
    return tuple(_gate(item, nodes, f"{where}.{index}") for index, item in enumerate(given))


def read_promotion(given: Any, nodes: Collection[str], where: str) -> Promotion | None:
    """The `promote:` of a preset, checked. Its gates may be written as {node, metric, at_least, at_most}."""
    if given is None:
        return None
    _keys(given, ("name", "node", "gates"), where)
    for key in ("name", "node"):
        if not isinstance(given.get(key), str):
            raise ConfigError(f"{where}.{key}: missing; a promotion has a name and the node that gets it")
    try:
        check_name(given["name"])
    except StoreError as error:
        raise ConfigError(f"{where}.name: {error}") from None
    if given["node"] not in nodes:
        raise ConfigError(f"{where}.node: no node named {given['node']!r}; {nearest(given['node'], nodes)}")
    listed = given.get("gates")
    if listed is not None and not isinstance(listed, list):
        raise ConfigError(f"{where}.gates: expected a list of gates, got {listed!r}")
    gates = []
    for index, item in enumerate(listed or []):
        if isinstance(item, Mapping) and "metric" in item:
            _keys(item, ("name", "node", "metric", "at_least", "at_most"), f"{where}.gates.{index}")
            value = f"{item.get('node', '')}.{item['metric']}"
            item = {key: item[key] for key in ("name", "at_least", "at_most") if key in item} | {
                "value": value
            }
        gates.append(_gate(item, nodes, f"{where}.gates.{index}"))
    return Promotion(given["name"], given["node"], tuple(gates))


def _gate(given: Any, nodes: Collection[str], where: str) -> Gate:
    _keys(given, ("name", "value", "at_least", "at_most"), where)
    value = given.get("value")
    if not isinstance(value, str):
        raise ConfigError(f"{where}.value: expected 'node.metric' or 'a.metric - b.metric', got {value!r}")
    bounds = {key: given[key] for key in ("at_least", "at_most") if key in given}
    for key, bound in bounds.items():
        if not isinstance(bound, int | float) or isinstance(bound, bool):
            raise ConfigError(f"{where}.{key}: expected a number, got {bound!r}")
    if not bounds:
        raise ConfigError(f"{where}: a gate needs at_least or at_most")
    return Gate(str(given.get("name", value)), value, _terms(value, nodes, f"{where}.value"), **bounds)


def _terms(text: str, nodes: Collection[str], where: str) -> tuple[tuple[int, str, str], ...]:
    parts = re.split(r"\s+([+-])\s+", text.strip())
    terms = []
    for sign, part in zip(["+", *parts[1::2]], parts[::2], strict=True):
        node, dot, metric = part.partition(".")
        if not dot or not re.fullmatch(r"[\w.@/]+", metric):
            raise ConfigError(f"{where}: {part!r} is not node.metric (put spaces around + and -)")
        if node not in nodes:
            raise ConfigError(f"{where}: no node named {node!r}; {nearest(node, nodes)}")
        terms.append((-1 if sign == "-" else 1, node, metric))
    return tuple(terms)


def _keys(given: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a mapping with {', '.join(names)}, got {given!r}")
    for key in given:
        if key not in names:
            raise ConfigError(f"{where}.{key}: no such key; {nearest(str(key), names)}")
