"""Reading a JSON object field by field: what is of the wrong type or out of bounds is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

from flows.serving.errors import ApiError, refused

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS[type(value)]


def parse_object(body: bytes) -> dict[str, Any]:
    """The object that a request's body holds; ApiError says where it stops being JSON."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not JSON at {where}: {error.msg}", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits, NaN, and brackets nested thousands deep.
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON that can be read: {why}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, it is {kind(found)}", code="invalid_json")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def text_of(value: Any, name: str) -> str:
    """A string that can be encoded; `name` is what the error calls it."""
    if not isinstance(value, str):
        raise refused(name, f"must be a string, it is {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise refused(
            name, f"half of a surrogate pair at character {error.start}: send whole characters"
        ) from None
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """A list with something in it."""
    if not isinstance(value, list):
        raise refused(name, f"must be an array, it is {kind(value)}")
    if not value:
        raise refused(name, "must not be empty")
    return value


class Fields:
    """Typed access to one object. A field that is null counts as not given, as OpenAI has it.

    `within` is the name of the object in its request, "" for the request itself.
    """

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self.values = values
        self.within = within

    def name(self, field: str) -> str:
        """What an error calls a field."""
        return f"{self.within}.{field}" if self.within else field

    def given(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def flag(self, field: str) -> bool:
        """A truth value, False by default."""
        value = self.values.get(field)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise refused(self.name(field), f"must be true or false, it is {kind(value)}")
        return value

    def whole(self, field: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number of `low` to `high`."""
        value = self.values.get(field)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise refused(self.name(field), f"must be a whole number, it is {kind(value)}")
        if not low <= value <= high:
            raise refused(self.name(field), f"must be between {low} and {high}, it is {_short(value)}")
        return value

    def number(self, field: str, default: float, low: float, high: float) -> float:
        """A number of `low` to `high`."""
        value = self.values.get(field)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise refused(self.name(field), f"must be a number, it is {kind(value)}")
        # 1e999 is JSON and reads as infinity.
        if not low <= value <= high or not math.isfinite(value):
            raise refused(self.name(field), f"must be between {low:g} and {high:g}, it is {_short(value)}")
        return float(value)

    def text(self, field: str) -> str:
        """A string that must be given."""
        if not self.given(field):
            raise refused(self.name(field), "missing: give a string")
        return text_of(self.values[field], self.name(field))

    def object(self, field: str) -> Fields:
        """An object, empty by default."""
        value = self.values.get(field)
        if value is None:
            return Fields({}, self.name(field))
        if not isinstance(value, dict):
            raise refused(self.name(field), f"must be an object, it is {kind(value)}")
        return Fields(value, self.name(field))


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:36]}..."
