"""The house: which room may import from which, and how long a file may be. Read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"kernels": 0, "infra": 1, "model": 2, "data": 3, "post_training": 4, "flows": 5}
STRANGERS = {("data", "model"), ("model", "data")}
"""Rooms that do not know each other although one is above the other."""
BARE = {"kernels", "model", "infra/parallel", "infra/cluster"}
BARE_PACKAGES = {"torch", "triton", "numpy", "safetensors"}
PEERS = {"deep_gemm", "transformers"}
"""Compared with by a bench where they are installed; nothing depends on them."""
DRAWING = ("kernels/experiments/", "model/precision_study/", "infra/cluster/pipeline/timeline.py")
"""Where matplotlib draws figures after they were written, if it is installed."""
LONGEST = 450


def files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else (node.module or "").partition(".")[0]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def wrong(path: Path) -> list[str]:
    """Imports of a file that go up, sideways or are relative."""
    room, found = room_of(path), []
    for line, package in imported(path):
        if package == "." or package == "tests":
            found.append(f"{path.relative_to(ROOT)}:{line} imports from {package}")
        elif FLOORS.get(package, 0) > FLOORS[room] or (room, package) in STRANGERS:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {package}")
    return found


def test_every_room_is_there_with_files_in_it():
    assert all(len(files(room)) > 3 for room in FLOORS)
    top = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert top == set(FLOORS)


def test_a_room_imports_only_from_the_floors_below():
    assert [line for path in files(*FLOORS) for line in wrong(path)] == []


@pytest.mark.parametrize(
    ("room", "source", "count"),
    [
        (
            "model",
            "import torch\nfrom infra.errors import HeadwaterError\nfrom model.config import ModelConfig",
            0,
        ),
        ("model", "def f():\n    from flows.cli import main", 1),
        ("model", "import data.chat", 1),
        ("data", "from model import config", 1),
        ("infra", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import model.train as t", 1),
        ("flows", "import kernels, infra, model, data, post_training", 0),
        ("post_training", "from . import grpo\nfrom tests.toys import x", 2),
    ],
)
def test_the_check_sees_what_it_should(monkeypatch, tmp_path, room, source, count):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / room / "sub" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(wrong(path)) == count


def test_bare_rooms_name_no_other_package():
    allowed = set(sys.stdlib_module_names) | BARE_PACKAGES | PEERS | {"infra", "kernels", "model"}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {package}"
        for path in files(*BARE)
        for line, package in imported(path)
        if package not in allowed
        if not (package == "matplotlib" and str(path.relative_to(ROOT)).startswith(DRAWING))
    ]
    assert found == []


def test_prefect_is_imported_by_no_stage():
    stages = files("flows/stages")
    assert len(stages) > 5
    assert [path.name for path in stages for _, package in imported(path) if package == "prefect"] == []


def test_files_are_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files(*FLOORS, "tests")
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_kernels_package_is_empty():
    """`import transformers` runs it, taking it for the hub's package of that name."""
    assert (ROOT / "kernels" / "__init__.py").read_bytes() == b""
