"""The quality rules of Gopher (Rae et al. 2021, appendix A.1)."""

from dataclasses import dataclass

from data.filters.features import ALPHABETIC, NON_SYMBOL, Features


@dataclass(frozen=True)
class GopherQuality:
    """A document is dropped by the first rule it breaks; the thresholds are the paper's.

    `min_stop_words` counts different English stop words: set it to 0 for other languages.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2

    name = "gopher_quality"

    def check(self, document: Features) -> str | None:
        text = document.text
        real = (document.word_flags & NON_SYMBOL) > 0
        count = int(real.sum())
        if count < self.min_words:
            return "too_few_words"
        if count > self.max_words:
            return "too_many_words"
        mean = float(document.word_lengths[real].mean()) if count else 0.0
        if mean < self.min_word_length:
            return "short_words"
        if mean > self.max_word_length:
            return "long_words"
        words = max(1, len(document.words))
        if text.count("#") / words > self.max_symbols_per_word:
            return "hashes"
        if (text.count("...") + text.count("…")) / words > self.max_symbols_per_word:
            return "ellipses"
        lines = text.splitlines() or [""]
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > self.max_bullet_lines:
            return "bullet_lines"
        ends = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        if ends / len(lines) > self.max_ellipsis_lines:
            return "ellipsis_lines"
        if ((document.word_flags & ALPHABETIC) > 0).sum() / words < self.min_alphabetic_words:
            return "few_alphabetic_words"
        if document.stop_words < self.min_stop_words:
            return "few_stop_words"
        return None
