"""Byte-level BPE trained on the released model's pretokenizer.

The text is first cut by three regular expressions (the report, section 4.1, and the released
`tokenizer.json`): runs of up to three digits; runs of CJK characters; then words with the sign or space
before them, punctuation *with the line breaks that follow it*, line breaks, and other white space. Merges
never cross a cut. All 256 bytes are in the vocabulary, so every text can be written and comes back
unchanged.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.chat import END_THINK, SPECIALS, THINK, ChatTokenizer
from infra.errors import HeadwaterError

CJK = "[一-龥぀-ゟ゠-ヿ]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
SMALLEST_VOCABULARY = len(SPECIALS) + 256


def pretokenizer(max_digits: int = 3) -> pre_tokenizers.PreTokenizer:
    """The three cuts, then bytes written as letters. `max_digits` is 3 in the released model.

    With 1 every digit is a token of its own. A tiny vocabulary has room for some digit runs only, so with 3
    a small model meets numbers in several spellings and has to learn them all before it can add.
    """
    digits = r"\p{N}" if max_digits == 1 else rf"\p{{N}}{{1,{max_digits}}}"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), "isolated"),
            pre_tokenizers.Split(Regex(CJK), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(texts: Iterable[str], vocab_size: int, max_digits: int = 3) -> str:
    """Train on the texts and return the content of `tokenizer.json`.

    `vocab_size` counts the control tokens and the 256 bytes; a small corpus may have too few repeated
    pairs to reach it, so read the true size from the result. The same texts in any order give the same
    bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise HeadwaterError(
            f"vocab_size {vocab_size} is too small: {len(SPECIALS)} control tokens and 256 bytes need "
            f"at least {SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pretokenizer(max_digits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(content, normalized=False, special=True) for content in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())
    # As in R1, the think tags are ordinary added tokens: decoding "without special tokens" keeps them, so
    # that a reader of the exported model can still tell the thought from the answer.
    for entry in spec["added_tokens"]:
        entry["special"] = entry["id"] not in (THINK, END_THINK)
    return json.dumps(spec, ensure_ascii=False, indent=1) + "\n"


@dataclass(frozen=True)
class Fit:
    """How well a tokenizer fits some texts."""

    documents: int
    bytes: int
    tokens: int
    failures: int  # texts that did not come back unchanged, or that gave a control id: always 0

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


def measure(tokenizer: ChatTokenizer, texts: Sequence[str], batch: int = 256) -> Fit:
    """Encode and decode the texts: their size in bytes and tokens, and how many failed the round trip."""
    size = tokens = failures = 0
    for start in range(0, len(texts), batch):
        chunk = texts[start : start + batch]
        for text, ids in zip(chunk, tokenizer.encode_many(chunk), strict=True):
            size += len(text.encode("utf-8"))
            tokens += len(ids)
            failures += tokenizer.decode(ids) != text or (bool(ids) and min(ids) < len(SPECIALS))
    return Fit(documents=len(texts), bytes=size, tokens=tokens, failures=failures)
