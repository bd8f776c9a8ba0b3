"""Conversations of several turns as token ids, in the layout of `data/chat.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.chat import ChatTokenizer


@dataclass(frozen=True)
class Message:
    """What one side said. `role` is system, user or assistant; an assistant's text is its answer alone:
    thoughts of earlier turns are not shown to the model again, as in DeepSeek's own layout."""

    role: str
    text: str


def conversation_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[int]:
    """BOS system USER prompt ASSISTANT answer EOS USER prompt ... ASSISTANT: all before the next response.

    For one user message these are the tokenizer's `prompt_ids`. System messages are gathered at the front,
    wherever they stand, since the layout has one place for them; a blank line goes between two. Texts are
    encoded raw, so nothing in them can become a control token.
    """
    from data.chat import ASSISTANT, BOS, EOS, USER

    system = "\n\n".join(message.text for message in messages if message.role == "system")
    turns = [message for message in messages if message.role != "system"]
    # Unlike `encode`, `encode_many` lets the process's other threads run meanwhile.
    first, *rest = tokenizer.encode_many([system, *(message.text for message in turns)])
    ids = [BOS, *first]
    for message, text in zip(turns, rest, strict=True):
        ids += [USER, *text] if message.role == "user" else [ASSISTANT, *text, EOS]
    return [*ids, ASSISTANT]


def fit(
    tokenizer: ChatTokenizer, messages: Sequence[Message], room: int
) -> tuple[list[int], list[Message], int]:
    """The ids of as much of a conversation as `room` tokens hold, its messages, and how many turns that lost.

    The oldest turns go first, each question with its answer; system messages and the last question stay,
    so the ids may still be too many.
    """
    system = [message for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    lost = 0
    while True:
        kept = [*system, *turns]
        ids = conversation_ids(tokenizer, kept)
        later = next((i for i in range(1, len(turns)) if turns[i].role == "user"), None)
        if len(ids) <= room or later is None:
            return ids, kept, lost
        turns, lost = turns[later:], lost + 1
