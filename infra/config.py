"""Stage configuration: frozen, typed, and split into what identifies a result and where it happens to run.

*Identity* fields are part of an artifact's fingerprint. *Placement* fields (devices, worker counts, folders,
ports, log levels, threads) never are: mark them with `placement(...)`, or inside a stdlib dataclass with
`field(metadata={"placement": True})`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from infra.errors import ConfigError, nearest


def _check_annotation(kind: Any, where: str) -> None:
    """Refuse unions (Prefect's form breaks on them) and nested models that would swallow a misspelt field."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        raise TypeError(f"{where}: unions are not allowed in a configuration; use a sentinel such as '' or 0")
    if origin is typing.Literal:
        return
    if isinstance(kind, type):
        if issubclass(kind, BaseModel) and not issubclass(kind, Section):
            raise TypeError(f"{where}: {kind.__name__} must derive from infra.config.Section")
        if dataclasses.is_dataclass(kind):
            for name, inner in typing.get_type_hints(kind).items():
                if typing.get_origin(inner) is not typing.ClassVar:
                    _check_annotation(inner, f"{where}.{name}")
    for inner in typing.get_args(kind):
        _check_annotation(inner, where)


# Type of the error for a truth value where a number belongs.
_TRUTH = "truth_for_a_number"


def _truth(kind: Any, value: Any, place: str) -> str | None:
    """Where in `value` a truth value stands for a number of `kind`; None if nowhere. Sections see to
    themselves."""
    inner = typing.get_args(kind)
    outer = typing.get_origin(kind) or kind
    if outer is typing.Annotated:
        return _truth(inner[0], value, place)
    if outer in (int, float):
        return place if isinstance(value, bool) else None
    parts: list[tuple[Any, Any, str]] = []
    if outer in (list, tuple) and inner and isinstance(value, (list, tuple)):
        several = outer is tuple and inner[-1] is not Ellipsis
        kinds = inner if several else [inner[0]] * len(value)
        parts = [(one, item, f"{place}.{i}") for i, (one, item) in enumerate(zip(kinds, value, strict=False))]
    elif outer is dict and inner and isinstance(value, Mapping):
        parts = [(inner[1], item, f"{place}.{name}") for name, item in value.items()]
    elif isinstance(outer, type) and dataclasses.is_dataclass(outer) and isinstance(value, Mapping):
        parts = [
            (one, value[name], f"{place}.{name}") for name, one in _hints(outer).items() if name in value
        ]
    return next((found for found in (_truth(*part) for part in parts) if found is not None), None)


class Section(BaseModel):
    """A nested part of a stage's configuration: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            _check_annotation(field.annotation, f"{cls.__name__}.{name}")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant; pydantic would take them as 1 and 0."""
        place = _truth(cls.model_fields[str(info.field_name)].annotation, value, "")
        if place is not None:
            raise PydanticCustomError(_TRUTH, "a number is expected, not true or false", {"below": place})
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        # Forms label a nested box by its title: the first line of the docstring reads better than a class
        # name.
        schema = handler.resolve_ref_schema(handler(core_schema))
        doc = (cls.__doc__ or "").strip()
        if doc:
            schema["title"] = doc.splitlines()[0].rstrip(".")
        return schema


def placement(default: Any = ..., **kw: Any) -> Any:
    """A field that says where or how fast, not what: recorded, never part of the fingerprint.

    Takes what `pydantic.Field` takes (description, bounds, default_factory).
    """
    extra = {**(kw.pop("json_schema_extra", None) or {}), "placement": True}
    if "default_factory" in kw:
        return Field(json_schema_extra=extra, **kw)
    return Field(default, json_schema_extra=extra, **kw)


class StageConfig(Section):
    """What one stage is asked to do."""

    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of every random choice of the stage; part of its identity."
    )
    threads: int = placement(0, ge=0, description="CPU threads of the stage; 0 = all cores it was given.")


class ModelStageConfig(StageConfig):
    """What a stage that runs a model is asked to do."""

    device: Literal["auto", "cpu", "cuda"] = placement(
        "auto", description="Where the model runs; auto = a CUDA device if there is one, else the CPU."
    )


Config = TypeVar("Config", bound=Section)


def parse(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Make a `kind` out of plain values (YAML, JSON, `--set`).

    Raises ConfigError naming each bad field as `where.field.sub`, with the nearest valid names for an
    unknown one.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for one in error.errors(include_url=False):
            parts = [str(part) for part in one["loc"]]
            path = ".".join(([where] if where else []) + parts) or kind.__name__
            path += one["ctx"]["below"] if one["type"] == _TRUTH else ""
            if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                valid = _fields_at(kind, list(one["loc"][:-1]))
                lines.append(f"{path}: no such field; {nearest(parts[-1], valid)}")
            else:
                lines.append(f"{path}: {one['msg'].lower()} (got {one['input']!r:.80})")
        raise ConfigError("\n".join(lines)) from None


def _fields_at(kind: Any, loc: list[Any]) -> list[str]:
    """Names of the fields of the model or dataclass at `loc` inside `kind`; list indices are stepped over."""
    for part in loc:
        kind = _hints(kind).get(part, kind) if isinstance(part, str) else kind
        while typing.get_args(kind) and typing.get_origin(kind) is not typing.Literal:
            kind = typing.get_args(kind)[-1 if typing.get_origin(kind) is dict else 0]
    return sorted(_hints(kind))


def _hints(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {}


def split(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a configuration (model or dataclass) into `(identity, placement)`, both plain JSON values.

    Goes into nested models, dataclasses, lists and string-keyed dicts. A list of parts that have placement
    fields gives a list of the same length on the placement side. Raises ConfigError naming the path of a
    value that JSON cannot hold deterministically (sets, bytes, NaN, arbitrary objects).
    """
    if not isinstance(config, BaseModel) and not dataclasses.is_dataclass(config):
        raise ConfigError(f"a configuration must be a model or a dataclass, not {type(config).__name__}")
    identity, aside = _split(config, "")
    return identity, aside or {}


def _split(value: Any, path: str) -> tuple[Any, Any]:
    """`(identity, placement or None)` of one value."""
    fields = _members(value)
    if fields is not None:
        identity: dict[str, Any] = {}
        aside: dict[str, Any] = {}
        for name, inner, is_placement in fields:
            where = f"{path}.{name}" if path else name
            if is_placement:
                aside[name] = plain(inner, where)
                continue
            identity[name], inner_aside = _split(inner, where)
            if inner_aside is not None:
                aside[name] = inner_aside
        return identity, aside or None
    if isinstance(value, Mapping):
        return _split_many({_key(key, path): inner for key, inner in value.items()}, path)
    if isinstance(value, (list, tuple)):
        identities, asides = _split_many(dict(enumerate(value)), path)
        return list(identities.values()), None if asides is None else [
            asides.get(i) for i in range(len(value))
        ]
    return plain(value, path), None


def _split_many(items: dict[Any, Any], path: str) -> tuple[dict[Any, Any], dict[Any, Any] | None]:
    identity: dict[Any, Any] = {}
    aside: dict[Any, Any] = {}
    for key, inner in items.items():
        where = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        identity[key], inner_aside = _split(inner, where)
        if inner_aside is not None:
            aside[key] = inner_aside
    return identity, aside or None


def _members(value: Any) -> list[tuple[str, Any, bool]] | None:
    """`(name, value, is placement)` of each field of a model or dataclass; None for anything else."""
    if isinstance(value, BaseModel):
        marks = {
            name: isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("placement"))
            for name, field in type(value).model_fields.items()
        }
        return [(name, getattr(value, name), mark) for name, mark in marks.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            (field.name, getattr(value, field.name), bool(field.metadata.get("placement")))
            for field in dataclasses.fields(value)
        ]
    return None


def _key(key: Any, path: str) -> str:
    if isinstance(key, enum.Enum):
        key = key.value
    if not isinstance(key, str):
        raise ConfigError(f"{path or 'value'}: a key must be a string, not {key!r} ({type(key).__name__})")
    return key


def plain(value: Any, path: str = "") -> Any:
    """The JSON form of a value: models to dicts, tuples to lists, enums to values, paths to text.

    Raises ConfigError naming the path of whatever has no deterministic JSON form.
    """
    where = path or "value"
    if isinstance(value, enum.Enum):
        return plain(value.value, path)
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {value} has no JSON form; give a finite number")
        return float(value)
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: text that is not valid Unicode ({value!r:.60})") from None
        return str(value)
    if isinstance(value, PurePath):
        return plain(value.as_posix(), path)
    fields = _members(value)
    if fields is not None:
        return {name: plain(inner, f"{path}.{name}".lstrip(".")) for name, inner, _ in fields}
    if isinstance(value, Mapping):
        items = [(_key(key, where), inner) for key, inner in value.items()]
        return {key: plain(inner, f"{path}.{key}".lstrip(".")) for key, inner in items}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [plain(inner, f"{path}[{i}]") for i, inner in enumerate(value)]
    hint = "; sort it into a list" if isinstance(value, (set, frozenset)) else ""
    raise ConfigError(
        f"{where}: {type(value).__name__} cannot be written as JSON deterministically{hint} "
        "(allowed: text, finite numbers, booleans, lists, string-keyed dicts, dataclasses, models)"
    )


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8.

    Only values that are already plain are taken: text, finite numbers, booleans, None, lists or tuples and
    string-keyed dicts. Anything else raises ConfigError naming the field's path.
    """
    _check_plain(value, "")
    return json.dumps(
        value,
        sort_keys=True,
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
        check_circular=False,
    ).encode("utf-8")


def _check_plain(value: Any, path: str) -> None:
    if type(value) is dict:
        for key, inner in value.items():
            plain(_key(key, path), path)
            _check_plain(inner, f"{path}.{key}".lstrip("."))
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{path}[{i}]")
    elif value is None or type(value) in (bool, int, float, str):
        plain(value, path)
    else:
        raise ConfigError(
            f"{path or 'value'}: {type(value).__name__} is not a plain JSON value "
            "(allowed: text, finite numbers, booleans, None, lists, string-keyed dicts)"
        )
