"""Configuration: split in identity and placement, canonical bytes, errors that name the field."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from infra.config import Section, StageConfig, canonical_json, parse, placement, plain, split
from infra.errors import ConfigError


@dataclass(frozen=True)
class Model:
    """A nested dataclass, as model/ has them."""

    width: int = 96
    ranks: tuple[int, ...] = (48, 32)
    device: str = field(default="cpu", metadata={"placement": True})


class Source(Section):
    """One source. It may have several lines."""

    name: str
    cache: str = placement("/tmp")


class Kind(enum.Enum):
    MUON = "muon"
    ADAM = "adam"


class Config(StageConfig):
    """A stage with a bit of everything.

    More about it.
    """

    model: Model = Model()
    sources: tuple[Source, ...] = ()
    weights: dict[str, float] = Field(default_factory=dict)
    kind: Kind = Kind.MUON
    mode: Literal["a", "b"] = "a"
    folder: Path = placement(Path("out"), description="Where.")
    rate: float = 0.1
    "Peak learning rate."


def test_split_goes_into_models_dataclasses_lists_and_dicts() -> None:
    config = Config(
        model=Model(width=8, device="cuda"),
        sources=(Source(name="a"), Source(name="b", cache="/x")),
        weights={"b": 1.0, "a": 0.5},
        kind=Kind.ADAM,
        threads=3,
    )
    identity, aside = split(config)
    assert identity == {
        "seed": 0,
        "model": {"width": 8, "ranks": [48, 32]},
        "sources": [{"name": "a"}, {"name": "b"}],
        "weights": {"b": 1.0, "a": 0.5},
        "kind": "adam",
        "mode": "a",
        "rate": 0.1,
    }
    assert aside == {
        "threads": 3,
        "model": {"device": "cuda"},
        "sources": [{"cache": "/tmp"}, {"cache": "/x"}],
        "folder": "out",
    }


def test_what_split_gives_makes_the_same_config_again() -> None:
    config = Config(sources=(Source(name="a"),), weights={"x": 2.0}, rate=1e-4)
    identity, _ = split(config)
    assert parse(Config, json.loads(canonical_json(identity))) == config


def test_config_is_frozen_and_described() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().rate = 1.0  # type: ignore[misc]
    schema = Config.model_json_schema()
    assert schema["title"] == "A stage with a bit of everything"
    assert schema["properties"]["rate"]["description"] == "Peak learning rate."
    assert schema["properties"]["folder"]["placement"] is True
    assert schema["$defs"]["Source"]["title"] == "One source. It may have several lines"


def test_unions_and_loose_models_are_refused_where_they_are_written() -> None:
    with pytest.raises(TypeError, match=r"Bad\.size: unions are not allowed"):

        class Bad(StageConfig):
            size: int | None = None

    class Loose(BaseModel):
        x: int = 0

    with pytest.raises(TypeError, match=r"Worse\.loose: Loose must derive from infra\.config\.Section"):

        class Worse(StageConfig):
            loose: tuple[Loose, ...] = ()

    @dataclass(frozen=True)
    class Inner:
        size: str | int = 0

    with pytest.raises(TypeError, match=r"Worst\.inner\.size: unions"):

        class Worst(StageConfig):
            inner: Inner = Inner()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rat": 1}, "node.config.rat: no such field; did you mean rate?"),
        ({"model": {"widht": 1}}, "node.config.model.widht: no such field; did you mean width?"),
        (
            {"sources": [{"name": "a", "cahce": "x"}]},
            "node.config.sources.0.cahce: no such field; did you mean cache?",
        ),
        ({"rate": "fast"}, "node.config.rate: input should be a valid number"),
        ({"seed": -1}, "node.config.seed: input should be greater than or equal to 0 (got -1)"),
        ({"rate": True}, "node.config.rate: a number is expected, not true or false"),
        ({"seed": False}, "node.config.seed: a number is expected"),
        ({"model": {"width": True}}, "node.config.model.width: a number is expected"),
        ({"model": {"ranks": [48, True]}}, "node.config.model.ranks.1: a number is expected"),
        ({"weights": {"text": True}}, "node.config.weights.text: a number is expected"),
        ({"mode": "c"}, "node.config.mode: input should be 'a' or 'b' (got 'c')"),
    ],
)
def test_parse_names_the_field_and_the_nearest_names(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Config, values, "node.config")
    assert message in str(caught.value)


def test_whole_numbers_are_numbers_and_truth_values_stay_what_they_are() -> None:
    class Switch(StageConfig):
        on: bool = False
        rate: float = 0.5
        weights: dict[str, float] = Field(default_factory=dict)

    config = parse(Switch, {"on": True, "rate": 2, "weights": {"text": 1}})
    assert (config.on, config.rate, config.weights) == (True, 2.0, {"text": 1.0})
    assert all(isinstance(one, float) for one in (config.rate, config.weights["text"]))


def test_parse_names_every_bad_field() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Config, {"rate": "x", "mode": "c", "nope": 1})
    assert len(str(caught.value).splitlines()) == 3


class Anything(StageConfig):
    value: Any = None
    nested: dict[str, Any] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1, 2}, "set cannot be written as JSON deterministically; sort it into a list"),
        (frozenset("a"), "frozenset cannot be written"),
        (b"x", "bytes cannot be written"),
        (object(), "object cannot be written"),
        (math.nan, "nan has no JSON form"),
        (math.inf, "inf has no JSON form"),
        ({1: 2}, "a key must be a string"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_what_has_no_deterministic_form_is_named_by_its_path(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        split(Anything(nested={"deep": [0, {"here": value}]}))
    assert str(caught.value).startswith("nested.deep[1].here")
    with pytest.raises(ConfigError) as caught:
        canonical_json({"deep": [0, {"here": value}]})
    assert str(caught.value).startswith("deep[1].here")


def test_canonical_json_takes_plain_values_only() -> None:
    assert (
        canonical_json({"b": [1, 2.5, None, True], "a": "é"})
        == '{"a":"é","b":[1,2.5,null,true],"b2":0}'.replace(',"b2":0', "").encode()
    )
    for value in (Path("x"), Kind.ADAM, Model(), Config()):
        with pytest.raises(ConfigError, match=r"field: .* is not a plain JSON value"):
            canonical_json({"field": value})
    assert plain({"p": Path("a/b"), "k": Kind.ADAM, "t": (1, 2)}) == {"p": "a/b", "k": "adam", "t": [1, 2]}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
def test_canonical_json_reads_back_and_is_a_fixed_point(value: Any) -> None:
    raw = canonical_json(value)
    assert json.loads(raw) == value
    assert canonical_json(json.loads(raw)) == raw


@given(st.dictionaries(st.text("abc", max_size=3), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))
