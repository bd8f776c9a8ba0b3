"""Where a figure of the planner comes from. No sum hides that its parts come from different places."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Origin(StrEnum):
    """The kinds of figures."""

    PREDICTED = "predicted"
    """Computed from the configuration and the description of the hardware."""
    REPLAYED = "replayed"
    """Computed from measured durations of the parts, which a schedule puts together."""
    PUBLISHED = "published input"
    """Read in a paper and entered as it stands there."""
    STATED = "stated"
    """Given by who plans."""


def origins(parts: Iterable[Origin]) -> tuple[Origin, ...]:
    """The different origins among `parts`, in the order of the class."""
    found = set(parts)
    return tuple(origin for origin in Origin if origin in found)
