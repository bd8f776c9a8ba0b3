"""Split combined tokens now and then, against the token boundary bias.

The pretokenizer joins punctuation with the line breaks after it, so `");\\n"` may be one token. A prompt
that ends in `");"` without the line break then shows the model a token that hardly ever came last in
training. The report (section 4.1) splits a random proportion of such tokens in training; it does not
publish the proportion. The default here is therefore 0: every token split costs a place in the row, and
none of our evaluations ends a prompt in the middle of a line.
"""

import numpy as np
import regex

from data.chat import SPECIALS, ChatTokenizer
from data.hashing import generator

_COMBINED = regex.compile(r"( ?[\p{P}\p{S}]+)([\r\n]+)")


class BoundarySplitter:
    """Splits a share `rate` of the combined tokens of each document, chosen by document id and place."""

    def __init__(self, tokenizer: ChatTokenizer, rate: float, seed: int) -> None:
        self.rate = rate
        self.seed = seed
        self.parts: dict[int, np.ndarray] = {}
        for token_id, spelled in enumerate(tokenizer.token_bytes()):
            if token_id < len(SPECIALS):
                continue
            found = _COMBINED.fullmatch(spelled.decode("utf-8", "replace"))
            if found and "\ufffd" not in found[0]:
                halves = tokenizer.encode(found[1]) + tokenizer.encode(found[2])
                self.parts[token_id] = np.asarray(halves, dtype=np.int32)
        self._width = np.ones(tokenizer.vocab_size, dtype=np.int64)
        for token_id, halves in self.parts.items():
            self._width[token_id] = len(halves)

    def split(self, ids: np.ndarray, document_id: str) -> np.ndarray:
        """The ids with some combined tokens replaced by their two halves. The text they spell is the same."""
        if not self.rate or not len(ids):
            return ids
        draws = generator("boundary", self.seed, document_id, len(ids)).random(len(ids))
        hit = np.flatnonzero((self._width[ids] > 1) & (draws < self.rate))
        counts = np.ones(len(ids), dtype=np.int64)
        counts[hit] = self._width[ids[hit]]
        starts = np.cumsum(counts) - counts
        out = np.repeat(ids, counts)
        for place in hit:
            halves = self.parts[int(ids[place])]
            out[starts[place] : starts[place] + len(halves)] = halves
        return out
