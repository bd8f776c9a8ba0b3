"""The standard library of the running interpreter, as code and as prose.

Every module gives two documents: its source without docstrings, and its docstrings with the signatures
they belong to. So no sentence is there twice, and the quality filters can judge prose as prose.
"""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data.documents import DOCSTRINGS, Document, make_document
from data.sources.base import Candidate, Reading, Rejection, candidate, read_text

LICENCE = "PSF-2.0"
_SKIPPED = frozenset(["__pycache__", "idle_test", "site-packages", "dist-packages", "test", "tests"])
_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class StdlibSource:
    """Modules of the standard library, without its tests."""

    name = "stdlib"

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(sysconfig.get_paths()["stdlib"])

    def candidates(self) -> list[Candidate]:
        found = []
        for file in self.folder.rglob("*.py"):
            inside = file.relative_to(self.folder)
            if _SKIPPED.isdisjoint(inside.parts[:-1]):
                found.append(candidate(f"python/{inside.as_posix()}", file))
        return sorted(found, key=lambda one: one.name)

    def read(self, candidate: Candidate, reading: Reading) -> Iterator[Document | Rejection]:
        found = read_text(candidate, reading.max_document_bytes)
        if found.rejection:
            yield found.rejection
            return
        module = candidate.name.removeprefix("python/").removesuffix(".py").removesuffix("/__init__")
        code, prose = split_docstrings(found.text, module.replace("/", "."))
        if code.strip():
            yield make_document("stdlib-code", candidate.name, LICENCE, code)
        if prose.strip():
            yield make_document("stdlib-docstrings", f"{candidate.name}{DOCSTRINGS}", LICENCE, prose)


def split_docstrings(text: str, module: str) -> tuple[str, str]:
    """Divide a module's source in the code without docstrings, and the docstrings under their signatures.

    A source that this interpreter cannot parse, or that is nested too deep to walk, is all code.
    """
    # The parser ends a line at a lone \r too: its line numbers must be those of the lines cut below.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines: list[str | None] = [*text.split("\n")]
    prose: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(text)
        _collect(tree, module, lines, prose)
    except (SyntaxError, ValueError, RecursionError):
        return text, ""
    return "\n".join(line for line in lines if line is not None), "\n\n".join(prose) + "\n" * bool(prose)


def _collect(scope: _Scope, name: str, lines: list[str | None], prose: list[str]) -> None:
    """Move the docstrings of a scope and of those in it to `prose`; their lines become None."""
    docstring = ast.get_docstring(scope, clean=False)
    if docstring is not None and docstring.strip():
        prose.append(f"{_title(scope, name)}\n\n{inspect.cleandoc(docstring)}")
        _cut(scope, lines)
    for inner in _scopes_in(scope):
        _collect(inner, f"{name}.{inner.name}", lines, prose)


def _scopes_in(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The classes and functions directly in a scope, also those under `if`, `try` and `with`."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner
        else:
            yield from _scopes_in(inner)


def _title(scope: _Scope, name: str) -> str:
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(scope.args)})"
    return f"class {name}" if isinstance(scope, ast.ClassDef) else name


def _cut(scope: _Scope, lines: list[str | None]) -> None:
    statement = scope.body[0]
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    head = (lines[first] or "").encode()[: statement.col_offset].decode()
    tail = (lines[last] or "").encode()[statement.end_col_offset :].decode()
    if head.strip() or tail.strip():  # shares a line with code: leave it
        return
    lines[first : last + 1] = [None] * (last + 1 - first)
    if len(scope.body) == 1 and not isinstance(scope, ast.Module):
        lines[first] = f"{head}pass"  # the body would be empty
