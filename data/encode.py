"""From documents and problems to pieces: token ids with their loss mask, none longer than a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data import fim
from data.boundary import BoundarySplitter
from data.chat import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, ChatTokenizer
from data.hashing import unit
from data.packing import Piece


@dataclass(frozen=True)
class Problem:
    """A generated problem as the tasks stage writes it."""

    id: str
    family: str
    prompt: str
    thought: str
    answer: str
    system: str


class TextEncoder:
    """Encodes documents for training: BOS text EOS, a share of them rewritten with the middle last.

    A document that fits a row is one piece. A longer one is cut every `capacity` tokens, or, if it is
    rewritten, divided before. BOS is never a target: it follows from nothing.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, capacity: int, fim_rate: float, split_rate: float, seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self.capacity = capacity
        self.fim_rate = fim_rate
        self.seed = seed
        self._splitter = BoundarySplitter(tokenizer, split_rate, seed)

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[list[Piece]]:
        """The pieces of each (id, text)."""
        rewritten = [fim.chosen(name, self.fim_rate, self.seed) for name, _ in documents]
        plain = iter(
            self.tokenizer.encode_arrays(
                [text for (_, text), other in zip(documents, rewritten, strict=True) if not other]
            )
        )
        out = []
        for (name, text), other in zip(documents, rewritten, strict=True):
            if other:
                spans = fim.fim_pieces(text, name, self._encoder_for(name), self.capacity, self.seed)
            else:
                whole = _framed(self._splitter.split(next(plain), name))
                spans = [whole[i : i + self.capacity] for i in range(0, len(whole), self.capacity)]
            out.append([_target_all(span) for span in spans])
        return out

    def _encoder_for(self, name: str) -> fim.Encode:
        def encode(text: str) -> np.ndarray:
            return self._splitter.split(np.asarray(self.tokenizer.encode(text), dtype=np.int32), name)

        return encode


def heldout_pieces(tokenizer: ChatTokenizer, texts: Sequence[str], capacity: int) -> list[list[Piece]]:
    """The pieces of each text, for measuring: every token but BOS is a target exactly once.

    A piece that goes on where another was cut begins with the last token before the cut, as context and not
    as a target; so no target stands first in a row, where nothing could predict it.
    """
    out = []
    for ids in tokenizer.encode_arrays(texts):
        whole = _framed(ids)
        starts = range(0, max(1, len(whole) - 1), capacity - 1)
        out.append([_first_is_context(whole[start : start + capacity]) for start in starts])
    return out


class ProblemEncoder:
    """Encodes problems in the chat layout, a share of them with the answer alone."""

    def __init__(self, tokenizer: ChatTokenizer, direct_share: float, prompt_loss: bool, seed: int) -> None:
        self.tokenizer = tokenizer
        self.direct_share = direct_share
        self.prompt_loss = prompt_loss
        self.seed = seed

    def encode(self, problems: Sequence[Problem]) -> list[Piece]:
        """One piece a problem, of whatever length."""
        thoughts = [
            "" if unit("direct", self.seed, one.id) < self.direct_share else one.thought for one in problems
        ]
        # Few problems have a system prompt of their own: each is encoded once.
        systems = sorted({one.system for one in problems})
        encoded = dict(zip(systems, self.tokenizer.encode_arrays(systems), strict=True))
        parts = [
            [encoded[one.system] for one in problems],
            self.tokenizer.encode_arrays([one.prompt for one in problems]),
            self.tokenizer.encode_arrays(thoughts),
            self.tokenizer.encode_arrays([one.answer for one in problems]),
        ]
        out = []
        for system, prompt, thought, answer in zip(*parts, strict=True):
            before = [[BOS], system, [USER], prompt, [ASSISTANT]]
            after = [[THINK], thought, [END_THINK]] if len(thought) else []
            ids = _join([*before, *after, answer, [EOS]])
            piece = _target_all(ids)
            if not self.prompt_loss:
                piece.loss[: sum(len(part) for part in before)] = 0
            out.append(piece)
        return out


def _join(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _framed(ids: np.ndarray) -> np.ndarray:
    return _join([[BOS], ids, [EOS]])


def _target_all(ids: np.ndarray) -> Piece:
    return Piece(ids, (ids != BOS).astype(np.uint8))


def _first_is_context(ids: np.ndarray) -> Piece:
    loss = np.ones(len(ids), dtype=np.uint8)
    loss[0] = 0
    return Piece(ids, loss)
