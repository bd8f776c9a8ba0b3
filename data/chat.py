"""The chat layout and the tokenizer that speaks it.

One layout serves pretraining, SFT, RL and export. It has to: a model that met problems in another token
layout during pretraining loses most of what it learned about them when it is fine-tuned.

    document      BOS text EOS
    conversation  BOS system <｜User｜> prompt <｜Assistant｜> response EOS
    response      <think>thought</think>answer, or answer alone

The names of the control tokens are those of the released DeepSeek-V3 and R1 tokenizers; here they take
ids 0 to 9.

A raw text may contain the words `<｜User｜>` or `</think>` as plain characters. They must not turn into
control tokens: a document could then end itself, or a prompt could speak for the assistant. So raw text
goes through a second tokenizer that knows the same vocabulary and no added tokens at all, and control ids
are only ever placed by this file.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from infra.errors import HeadwaterError

SPECIALS: tuple[str, ...] = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END, USER, ASSISTANT, THINK, END_THINK = range(len(SPECIALS))

# The same layout for `tokenizer.apply_chat_template` in transformers. It holds for messages whose content
# has no sentinel strings in it: transformers turns those into control tokens, ChatTokenizer does not.
HF_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def hf_tokenizer_config(model_max_length: int) -> dict[str, object]:
    """Contents of `tokenizer_config.json` beside an exported `tokenizer.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[PAD],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "chat_template": HF_CHAT_TEMPLATE,
    }


@dataclass(frozen=True)
class Response:
    """What a generated response says, read from its ids (`</think>` written in letters does not count)."""

    thought: str  # text between <think> and </think>, "" without a thought
    answer: str  # text after </think>, or the whole text without a thought
    thinking: bool  # there was exactly one <think>, first, closed by exactly one </think>
    well_formed: bool  # ended by EOS, no control token out of place


class ChatTokenizer:
    """Encodes text and conversations with a trained `tokenizer.json` (a file, or the folder of one).

    Raises HeadwaterError when the file is missing, is not a tokenizer, or has other control tokens than
    SPECIALS.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise HeadwaterError(f"no tokenizer at {path}: build the tokenizer stage first") from None
        except (OSError, ValueError) as error:
            raise HeadwaterError(f"cannot read the tokenizer {path}: {error}") from error
        found = {entry["content"]: entry["id"] for entry in spec.get("added_tokens", [])}
        for token_id, content in enumerate(SPECIALS):
            if found.get(content) != token_id:
                raise HeadwaterError(
                    f"{path}: control token {content} must have id {token_id}, it has {found.get(content)}; "
                    "use a tokenizer made by the tokenizer stage"
                )
        # Without added tokens nothing in a raw text can match a control token, whatever its flags are.
        self._raw = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
        self.path = path
        self.vocab_size: int = self._raw.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of raw text, never a control id; `decode` gives every valid string back unchanged."""
        return self._raw.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel over the cores."""
        return [e.ids for e in self._raw.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_many` as int32 arrays, for callers that keep many tokens."""
        encodings = self._raw.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int32) for e in encodings]

    def decode(self, ids: Iterable[int], keep_specials: bool = False) -> str:
        """Text of the ids; control tokens are left out, or with `keep_specials` written as sentinel strings.

        Ids that cut a character in half give U+FFFD there.
        """
        ids = [int(i) for i in ids]
        if not keep_specials:
            return self._raw.decode([i for i in ids if i >= len(SPECIALS)], skip_special_tokens=False)
        parts: list[str] = []
        plain: list[int] = []
        for i in ids:
            if i >= len(SPECIALS):
                plain.append(i)
                continue
            parts += [self._raw.decode(plain, skip_special_tokens=False), SPECIALS[i]]
            plain = []
        return "".join([*parts, self._raw.decode(plain, skip_special_tokens=False)])

    def token_bytes(self) -> list[bytes]:
        """Bytes that each id stands for, by id; a control token stands for none."""
        table = byte_of_letter()
        out: list[bytes] = [b""] * self.vocab_size
        for token, token_id in self._raw.get_vocab().items():
            if token_id >= len(SPECIALS):
                out[token_id] = bytes(table[letter] for letter in token)
        return out

    def prompt_ids(self, prompt: str, system: str = "") -> list[int]:
        """BOS system <｜User｜> prompt <｜Assistant｜>: everything before the response."""
        return [BOS, *self.encode(system), USER, *self.encode(prompt), ASSISTANT]

    def response_ids(self, thought: str, answer: str) -> list[int]:
        """<think>thought</think>answer EOS, or answer EOS where the thought is empty."""
        if not thought:
            return [*self.encode(answer), EOS]
        return [THINK, *self.encode(thought), END_THINK, *self.encode(answer), EOS]

    def parse_response(self, ids: Iterable[int]) -> Response:
        """Read a generated response: the ids after <｜Assistant｜>, with EOS at the end if it came."""
        ids = [int(i) for i in ids]
        ended = EOS in ids
        if ended:
            ids = ids[: ids.index(EOS)]
        thinking = bool(ids) and ids[0] == THINK and ids.count(THINK) == 1 and ids.count(END_THINK) == 1
        if thinking:
            end = ids.index(END_THINK)
            thought_ids, answer_ids = ids[1:end], ids[end + 1 :]
        else:
            thought_ids, answer_ids = [], ids
        clean = all(i >= len(SPECIALS) for i in thought_ids + answer_ids)
        return Response(
            thought=self.decode(thought_ids),
            answer=self.decode(answer_ids),
            thinking=thinking,
            well_formed=ended and clean,
        )


def byte_of_letter() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes in (GPT-2's table: a printable byte is itself)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    spare = 256
    for byte in range(256):
        if byte not in printable:
            letters[chr(spare)] = byte
            spare += 1
    return letters
