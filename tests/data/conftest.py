"""A small tokenizer trained once for all data tests."""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
from hypothesis import settings

from data.chat import ChatTokenizer
from data.tokenizer import train

# The first example compiles or loads machine code, and the machine may be busy: time is not what is tested.
settings.register_profile("data", deadline=None)
settings.load_profile("data")


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
