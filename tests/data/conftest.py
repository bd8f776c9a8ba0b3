"""A small tokenizer trained once for all data tests."""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

from data.chat import ChatTokenizer
from data.tokenizer import train


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json with 512 ids, trained on three modules of the standard library."""
    texts = [inspect.getsource(module) for module in (ast, inspect, textwrap)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train(texts, 512), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat(tokenizer_file: Path) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_file)
