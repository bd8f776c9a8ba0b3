"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.artifact import Artifact
from infra.build import build
from infra.store import Store, open_store
from tests.infra.forge import Forge, forge
from tests.infra.toys import WORDS, WordsConfig


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return open_store(tmp_path / "home")


@pytest.fixture
def words(store: Store) -> Artifact:
    """The words artifact, built."""
    return build(store, WORDS, WordsConfig(), {}).artifact


@pytest.fixture(scope="session")
def forging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """Processes that can be killed."""
    with forge(tmp_path_factory.mktemp("forge")) as one:
        yield one
