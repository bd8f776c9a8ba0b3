"""The line rules of FineWeb (Penedo et al. 2024, section 3.6): pages that are lists, menus or fragments."""

from dataclasses import dataclass

from datatrove.utils.text import TERMINAL_PUNCTUATION

from data.filters.features import Features, duplicates


@dataclass(frozen=True)
class FineWebLines:
    """The defaults are FineWeb's, made for web pages where a line is a paragraph.

    In hard-wrapped text a line that ends a sentence is one of several, so lower `min_punctuated` and raise
    `max_newlines_per_word` there.
    """

    min_punctuated: float = 0.12
    max_short_lines: float = 0.67
    short_line: int = 30
    max_repeated_chars: float = 0.01
    max_newlines_per_word: float = 0.3

    name = "fineweb"

    def check(self, document: Features) -> str | None:
        lines = document.lines
        if not lines:
            return "empty"
        if sum(line[-1] in TERMINAL_PUNCTUATION for line in lines) / len(lines) < self.min_punctuated:
            return "unpunctuated_lines"
        if sum(len(line) <= self.short_line for line in lines) / len(lines) > self.max_short_lines:
            return "short_lines"
        newlines = document.text.count("\n")
        if duplicates(lines)[1] / (len(document.text) - newlines) > self.max_repeated_chars:
            return "repeated_line_characters"
        if newlines / max(1, len(document.words)) > self.max_newlines_per_word:
            return "list"
        return None
