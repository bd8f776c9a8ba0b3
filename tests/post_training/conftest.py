"""Fixtures of the post-training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from data.chat import ChatTokenizer
from tests.post_training.chain import Chain, make_chain
from tests.post_training.small import write_tokenizer


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Models this small run faster on one thread, and the bits do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A tokenizer of 320 ids at most that knows digits, boxes and the system prompt."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All stages from raw text to an exported checkpoint; each is built when a test first asks for it."""
    return make_chain(tmp_path_factory.mktemp("chain"))
