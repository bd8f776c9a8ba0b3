"""Rules for source code, after those of The Stack and StarCoder: minified, generated and data files."""

from dataclasses import dataclass

import regex

from data.filters.features import Features

_GENERATED = regex.compile(
    r"auto-?\s?generated|automatically generated|generated (?:by|from|file)|do not (?:edit|modify)|"
    r"machine generated|@generated",
    regex.IGNORECASE,
)
_HEAD = 1000  # characters in which a generator says so


@dataclass(frozen=True)
class Code:
    """Bounds on the lines and letters of a source file."""

    max_line: int = 1000  # characters in the longest line
    max_mean_line: float = 100.0
    min_alphabetic: float = 0.25  # share of letters among all characters
    min_alphanumeric: float = 0.25
    drop_generated: bool = True

    name = "code"

    def check(self, document: Features) -> str | None:
        text = document.text
        lengths = [len(line) for line in text.split("\n")]
        if max(lengths) > self.max_line:
            return "long_line"
        if len(text) / len(lengths) > self.max_mean_line:
            return "long_lines"
        letters, digits = _letters_and_digits(text)
        if letters / max(1, len(text)) < self.min_alphabetic:
            return "few_letters"
        if (letters + digits) / max(1, len(text)) < self.min_alphanumeric:
            return "few_letters_and_digits"
        if self.drop_generated and _GENERATED.search(text[:_HEAD]):
            return "generated"
        return None


def _letters_and_digits(text: str) -> tuple[int, int]:
    """Counts by deleting: for ASCII, which most code is, that runs at memory speed."""
    raw = text.encode("utf-8")
    letters = len(raw) - len(raw.translate(None, _LETTERS))
    digits = len(raw) - len(raw.translate(None, b"0123456789"))
    if not text.isascii():
        letters += sum(letter.isalpha() for letter in text if not letter.isascii())
    return letters, digits


_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
