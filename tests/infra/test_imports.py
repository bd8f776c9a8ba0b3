"""The static import graph."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from infra.errors import HeadwaterError
from infra.files import sha256_file
from infra.imports import ROOT, code_state, drift, git_state, module_digests, source_file

FILES = {
    "flows/__init__.py": "",
    "flows/stages/__init__.py": "",
    "flows/stages/train.py": """
import json, torch
from infra import stage
def run(config, context):
    import model.deep.net as net
    from data import loader
    from importlib import import_module
    import_module("model.lazy")
    if config:
        from . import sibling
        from ..up import thing
""",
    "flows/stages/sibling.py": "",
    "flows/stages/unrelated.py": "import model.unrelated",
    "flows/up.py": "thing = 1",
    "infra/__init__.py": "",
    "infra/stage.py": "from infra.errors import Oops",
    "infra/errors.py": "class Oops: pass",
    "model/__init__.py": "",
    "model/deep/__init__.py": "from model.deep.part import x",
    "model/deep/part.py": "import model.deep.net",
    "model/deep/net.py": "",
    "model/lazy.py": "this is not python (",
    "model/unrelated.py": "",
    "data/__init__.py": "",
    "data/loader.py": "",
    "json.py": "raise SystemExit",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_it_reaches_what_is_imported_and_nothing_else(tree: Path) -> None:
    found = module_digests(tree / "flows/stages/train.py", tree)
    assert set(found) == set(FILES) - {"json.py", "model/unrelated.py", "flows/stages/unrelated.py"}
    assert found["model/lazy.py"] == sha256_file(tree / "model/lazy.py")
    assert list(found) == sorted(found)


def test_a_change_is_seen_where_it_is_reached(tree: Path) -> None:
    entry = tree / "flows/stages/train.py"
    before = module_digests(entry, tree)
    (tree / "model/unrelated.py").write_text("x = 1")
    assert module_digests(entry, tree) == before
    (tree / "model/deep/part.py").write_text("import model.deep.net, model.unrelated")
    after = module_digests(entry, tree)
    assert drift(before, after) == ("model/deep/part.py", "model/unrelated.py (new)")
    assert drift(after, before) == ("model/deep/part.py", "model/unrelated.py (gone)")


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) == ("", "")
    commit, dirty = git_state()
    if commit:
        head = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert commit == head.stdout.strip()
        assert len(dirty) in (0, 64)


def test_a_strange_checkout_around_us_is_not_ours(tmp_path: Path) -> None:
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    assert git_state(tmp_path) == ("", "")


def test_a_function_without_a_file_is_refused() -> None:
    space: dict[str, object] = {}
    exec(compile("def run(config, context): pass", "<typed>", "exec"), space)
    with pytest.raises(HeadwaterError, match="must be defined in a source file"):
        source_file(space["run"])
    with pytest.raises(HeadwaterError, match="must be defined in a source file"):
        code_state(len)
