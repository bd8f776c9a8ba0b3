"""Fill in the middle: teach the model to write what stands between a prefix and a suffix.

The report (section 4.1) rewrites a tenth of the documents in prefix-suffix-middle order,

    BOS <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle EOS

chosen document by document and before packing. The cuts fall between characters, not tokens, because at
use the cursor stands anywhere; so the three parts are encoded one by one.

A document that is longer than a row is divided into chunks first and each chunk is rewritten by itself.
The other way round, packing would cut the rewritten document and leave rows with a prefix whose middle is
somewhere else.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from data.chat import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from data.hashing import generator, unit
from infra.errors import HeadwaterError

Encode = Callable[[str], np.ndarray]
SMALLEST_CAPACITY = 32
# Chunks are aimed a little under the capacity: parts encoded apart take a few tokens more than the whole.
_AIM = 0.9


def chosen(document_id: str, rate: float, seed: int) -> bool:
    """Whether this document is rewritten: a share `rate` of all documents, whatever their order."""
    return unit("fim", seed, document_id) < rate


def fim_pieces(text: str, document_id: str, encode: Encode, capacity: int, seed: int) -> list[np.ndarray]:
    """The document in prefix-suffix-middle order, as one or more whole spans of at most `capacity` tokens.

    `encode` gives the int32 ids of a raw text. Raises HeadwaterError if `capacity` is too small to hold a
    span.
    """
    if capacity < SMALLEST_CAPACITY:
        raise HeadwaterError(
            f"rows of {capacity} tokens cannot hold FIM spans; use {SMALLEST_CAPACITY} or more"
        )
    return list(_rewrite(text, encode, capacity, generator("fim-cut", seed, document_id)))


def _rewrite(text: str, encode: Encode, capacity: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    low, high = sorted(int(cut) for cut in draw.integers(0, len(text) + 1, size=2))
    span = _span(encode(text[:low]), encode(text[low:high]), encode(text[high:]))
    if len(span) <= capacity:
        yield span
        return
    for chunk in chunks(text, max(2, math.ceil(len(span) / (_AIM * capacity)))):
        yield from _rewrite(chunk, encode, capacity, draw)


def _span(prefix: np.ndarray, middle: np.ndarray, suffix: np.ndarray) -> np.ndarray:
    parts = ([BOS, FIM_BEGIN], prefix, [FIM_HOLE], suffix, [FIM_END], middle, [EOS])
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def chunks(text: str, parts: int) -> list[str]:
    """Divide a text in about equal parts of a character or more, after a line break where one is near."""
    parts = min(parts, len(text))
    step = len(text) / parts
    cuts = [0]
    for i in range(1, parts):
        aim = round(i * step)
        reach = int(step / 4)
        line = text.rfind("\n", max(cuts[-1], aim - reach), aim + reach) + 1
        cuts.append(line if line > cuts[-1] else aim)
    cuts.append(len(text))
    return [text[start:end] for start, end in pairwise(cuts) if end > start]


def is_fim(ids: np.ndarray) -> bool:
    """Whether a piece is a rewritten document."""
    return len(ids) > 1 and ids[1] == FIM_BEGIN
