"""Laying what a user wrote over a config class: partial values keep the rest of the default.

`--set pretrain.model.width=96` must keep the other fields of that stage's default model, where pydantic
alone would fall back to the class's own defaults, or demand the fields that have none. So defaults are
filled in here, level by level, and `infra.config.parse` then validates names, types and bounds.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Hashable, Mapping
from typing import Any

import pydantic
import yaml

from infra.config import Config, parse
from infra.errors import ConfigError


def validate(kind: type[Config], given: Mapping[str, Any], where: str) -> Config:
    """A config of `kind` from what the user wrote; ConfigError names the path of each wrong field."""
    return parse(kind, _overlay(kind, None, given), where)


def _overlay(kind: type, base: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    fields = _fields(kind)
    merged = {} if base is None else {name: getattr(base, name) for name in fields}
    for name, value in given.items():
        annotation, default = fields.get(name, (None, None))  # an unknown name is left for `parse` to refuse
        merged[name] = _value(annotation, merged.get(name, default), value)
    return merged


def _value(annotation: Any, default: Any, value: Any) -> Any:
    """Go down into nested models, lists and tables of models; anything else is left to pydantic."""
    outer, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if outer is typing.Annotated:
        return _value(inner[0], default, value)
    if _structured(outer) and isinstance(value, Mapping):
        return _overlay(outer, default if isinstance(default, outer) else None, value)
    if outer in (list, tuple) and inner and isinstance(value, list | tuple):
        return [_value(inner[0], None, item) for item in value]
    if outer is dict and len(inner) == 2 and isinstance(value, Mapping):
        return {name: _value(inner[1], None, item) for name, item in value.items()}
    return value


def _structured(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, pydantic.BaseModel) or dataclasses.is_dataclass(kind))


def _fields(kind: type) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default value or None) of a pydantic model or a dataclass."""
    if issubclass(kind, pydantic.BaseModel):
        return {
            name: (
                field.annotation,
                None if field.is_required() else field.get_default(call_default_factory=True),
            )
            for name, field in kind.model_fields.items()
        }
    hints = typing.get_type_hints(kind)
    return {
        field.name: (hints[field.name], _default(field)) for field in dataclasses.fields(kind) if field.init
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a name given twice and reads 1e-4 as a number, not as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} cannot be a name", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the name {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; ConfigError names `where` it came from and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: plain values only
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
