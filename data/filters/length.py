"""Documents that are too short to teach anything, or too long to be one document."""

from dataclasses import dataclass

from data.filters.features import Features


@dataclass(frozen=True)
class Length:
    """Bounds in characters; 0 switches a bound off."""

    min_chars: int = 100
    max_chars: int = 0

    name = "length"

    def check(self, document: Features) -> str | None:
        size = len(document.text)
        if size < self.min_chars:
            return "too_short"
        if self.max_chars and size > self.max_chars:
            return "too_long"
        return None
