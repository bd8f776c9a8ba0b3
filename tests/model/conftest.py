"""Fixtures of the model's tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    """A byte-level tokenizer of three control tokens and 61 letters: 64 ids."""
    specials = ["<bos>", "<eos>", "<pad>"]
    letters = [chr(code) for code in range(ord("!"), ord("!") + 61)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": content, **flags} for i, content in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(specials + letters)},
            "merges": [],
        },
    }
    path = tmp_path / "source" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(json.dumps(spec))
    return path


@pytest.fixture
def tokenizer_config() -> dict[str, object]:
    """The `tokenizer_config.json` that goes with it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
