"""Damage that shows in any language: text that went through a wrong decoder, or that is not text at all."""

from dataclasses import dataclass

import regex

from data.filters.features import ENCODED, Features

_CONTROL = bytes([*range(9), 11, *range(14, 32), 127])  # all but tab, line feed, form feed, carriage return
_UPPER_CONTROL = regex.compile("[\u0080-\u009f]")
# What UTF-8 read as Latin-1 looks like: a leading byte of a two-byte character, then a continuation byte.
_MOJIBAKE = regex.compile("[\u00c2\u00c3][\u0080-\u00bf]")


@dataclass(frozen=True)
class Integrity:
    """Largest shares of characters that may be replacements, controls, mis-decoded or encoded data."""

    max_replacement: float = 0.001
    max_control: float = 0.001
    max_mojibake: float = 0.005
    max_encoded: float = 0.3

    name = "integrity"

    def check(self, document: Features) -> str | None:
        text = document.text
        size = max(1, len(text))
        if text.count("\ufffd") / size > self.max_replacement:
            return "replacement_characters"
        raw = text.encode("utf-8")
        controls = len(raw) - len(raw.translate(None, _CONTROL))
        if not text.isascii():
            controls += len(_UPPER_CONTROL.findall(text))
        if controls / size > self.max_control:
            return "control_characters"
        if not text.isascii() and 2 * len(_MOJIBAKE.findall(text)) / size > self.max_mojibake:
            return "wrong_decoding"
        encoded = (document.word_flags & ENCODED) > 0
        if document.word_lengths[encoded].sum() / size > self.max_encoded:
            return "encoded_data"
        return None
