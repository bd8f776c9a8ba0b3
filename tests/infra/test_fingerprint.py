"""The fingerprint covers what a result depends on and nothing else."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import split
from infra.errors import ConfigError
from infra.fingerprint import artifact_id, fingerprint
from tests.infra.toys import Shape, TrainConfig, WordsConfig

BASE = {"stage": "s", "version": 1, "identity": {"a": 1}, "inputs": {"x": ["d1", "d2"]}, "sources": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "t"},
        {"version": 2},
        {"identity": {"a": 2}},
        {"identity": {"a": 1.0}},
        {"identity": {"b": 1}},
        {"inputs": {"x": ["d1"]}},
        {"inputs": {"x": ["d2", "d1"]}},
        {"inputs": {"y": ["d1", "d2"]}},
        {"sources": "s1"},
    ],
)
def test_each_part_counts(change: dict[str, object]) -> None:
    assert fingerprint(**{**BASE, **change}) != fingerprint(**BASE)


def test_an_empty_optional_role_does_not_count() -> None:
    assert fingerprint(**{**BASE, "inputs": {"x": ["d1", "d2"], "y": []}}) == fingerprint(**BASE)


@given(st.integers(0, 64), st.integers(1, 9), st.floats(0, 1))
def test_placement_never_counts(threads: int, workers: int, pause: float) -> None:
    moved = split(WordsConfig(threads=threads, shape=Shape(workers=workers)))[0]
    assert moved == split(WordsConfig())[0]
    assert split(TrainConfig(pause=pause))[0] == split(TrainConfig())[0]


def test_the_value_is_pinned() -> None:
    # A change of this value orphans every store there is: it must be meant.
    said = b'{"config":{"a":1},"inputs":{"x":["d1","d2"]},"sources":"","stage":"s","version":1}'
    assert fingerprint(**BASE) == hashlib.sha256(said).hexdigest()


def test_a_value_without_a_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.a"):
        fingerprint("s", 1, {"a": {1}}, {})


def test_ids() -> None:
    assert artifact_id("0123456789abcdef") == "0123456789ab"
    assert artifact_id("0123456789abcdef", 2) == "0123456789ab-2"
