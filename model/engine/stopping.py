"""Stop strings, matched on the bytes of the generated text.

A token of a byte-level vocabulary may hold a part of a character, one, or many, and a stop string may begin
and end anywhere inside tokens. So the text is followed byte by byte, and only as much of it is kept as the
longest stop string could still need.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Follows one answer. `token_bytes[i]` is what token i stands for; control tokens stand for nothing."""

    def __init__(self, stops: Sequence[str], token_bytes: Sequence[bytes]) -> None:
        self.stops = [(text, text.encode("utf-8")) for text in stops]
        self.token_bytes = token_bytes
        self.keep = max(len(raw) for _, raw in self.stops) - 1
        self.tail = b""

    def feed(self, token: int) -> str | None:
        """The stop string that this token completes, the one that begins first when there are several."""
        # A padded vocabulary has ids past the tokenizer's, which stand for nothing either.
        new = self.token_bytes[token] if token < len(self.token_bytes) else b""
        text = self.tail + new
        found = [(text.find(raw), stop) for stop, raw in self.stops if raw in text]
        self.tail = text[-self.keep :] if self.keep else b""
        return min(found)[1] if found else None
