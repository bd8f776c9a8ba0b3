"""The repetition rules of Gopher (Rae et al. 2021, table A1)."""

import re
from dataclasses import dataclass

from data.filters.features import Features, duplicates

_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")
_TOP = ((2, 0.20), (3, 0.18), (4, 0.16))
_DUPLICATE = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


@dataclass(frozen=True)
class GopherRepetition:
    """Largest shares of repeated lines, paragraphs and n-grams of words.

    `scale` multiplies every threshold: manuals and changelogs repeat themselves more than web pages do.
    """

    max_lines: float = 0.3
    max_paragraphs: float = 0.3
    max_line_chars: float = 0.2
    max_paragraph_chars: float = 0.2
    scale: float = 1.0

    name = "gopher_repetition"

    def check(self, document: Features) -> str | None:
        text = document.text
        size = max(1, len(text))
        paragraphs = _PARAGRAPHS.split(text.strip())
        count, chars = duplicates(paragraphs)
        if count / len(paragraphs) > self.max_paragraphs * self.scale:
            return "repeated_paragraphs"
        if chars / size > self.max_paragraph_chars * self.scale:
            return "repeated_paragraph_characters"
        lines = _LINES.split(text)
        count, chars = duplicates(lines)
        if count / len(lines) > self.max_lines * self.scale:
            return "repeated_lines"
        if chars / size > self.max_line_chars * self.scale:
            return "repeated_line_characters"
        for n, share in _TOP:
            if document.top_ngram_chars(n) / size > share * self.scale:
                return f"frequent_{n}_gram"
        for n, share in _DUPLICATE:
            if document.duplicate_ngram_chars(n) / size > share * self.scale:
                return f"repeated_{n}_grams"
        return None
