"""Which of our own source files a stage reaches, found by reading imports, without running any.

Imports inside functions count too: stages import torch and the rooms below them inside `run()`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.errors import HeadwaterError
from infra.files import sha256_bytes

FIRST_PARTY = ("kernels", "infra", "model", "data", "post_training", "flows")
# The folder that holds the packages: the checkout, or site-packages of an installed copy.
ROOT = Path(__file__).resolve().parent.parent


def source_file(function: Callable[..., Any]) -> Path:
    """The file that defines a function; HeadwaterError when it has none (typed at a prompt, compiled)."""
    try:
        name = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        name = None
    if not name or not Path(name).is_file():
        raise HeadwaterError(f"{function!r}: a stage's run function must be defined in a source file")
    return Path(name).resolve()


def module_digests(entry: Path, root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of each first-party file that `entry` imports, directly or not, itself included.

    Keys are paths relative to `root`. An entry outside `root` (a stage of the user's own) may import its
    neighbours too; those are keyed relative to its folder.
    """
    entry = entry.resolve()
    inside = entry.is_relative_to(root)
    bases = [(root, FIRST_PARTY)]
    if not inside or entry.relative_to(root).parts[0] not in FIRST_PARTY:
        bases.append((entry.parent, ()))
    found: dict[Path, str] = {}
    todo = [entry]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        stat = path.stat()
        digest, requests = _read(path, stat.st_mtime_ns, stat.st_size)
        found[path] = digest
        for dotted in requests:
            todo += [file for base, names in bases for file in _resolve(dotted, path, base, names)]
    keyed = {}
    for path, digest in found.items():
        base = root if path.is_relative_to(root) else entry.parent
        keyed[path.relative_to(base).as_posix()] = digest
    return dict(sorted(keyed.items()))


@functools.lru_cache(maxsize=4096)
def _read(path: Path, mtime_ns: int, size: int) -> tuple[str, tuple[str, ...]]:
    """The hash of a file and what it imports; a leading dot per level marks a relative import."""
    raw = path.read_bytes()
    try:
        tree = ast.parse(raw)
    except (SyntaxError, ValueError):
        return sha256_bytes(raw), ()
    return sha256_bytes(raw), tuple(sorted(set(_requests(tree))))


def _requests(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield start
            for alias in node.names:
                # `from package import name`: the name may be a module.
                yield f"{start}{'' if start.endswith('.') else '.'}{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def _resolve(dotted: str, importer: Path, base: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """The files that importing `dotted` loads: the module and the __init__.py of each package on the way."""
    if dotted.startswith("."):
        folder = importer.parent
        rest = dotted.lstrip(".")
        for _ in range(len(dotted) - len(rest) - 1):
            folder = folder.parent
        if not folder.is_relative_to(base):
            return
        parts = list(folder.relative_to(base).parts) + [part for part in rest.split(".") if part]
    else:
        parts = dotted.split(".")
    if not parts or (names and parts[0] not in names):
        return
    folder = base
    for part in parts:
        module, package = folder / f"{part}.py", folder / part / "__init__.py"
        if package.is_file():
            yield package
        elif module.is_file():
            yield module
            return
        elif not (folder / part).is_dir():
            return
        folder = folder / part


def drift(recorded: Mapping[str, str], current: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the files whose digests differ, with `(new)` or `(gone)` where one side has none; sorted."""
    names = []
    for name in sorted({*recorded, *current}):
        if recorded.get(name) != current.get(name):
            tail = "" if name in recorded and name in current else " (new)" if name in current else " (gone)"
            names.append(name + tail)
    return tuple(names)


def code_state(function: Callable[..., Any], root: Path = ROOT) -> dict[str, Any]:
    """`{commit, dirty, modules}` of the code behind a stage's run function.

    `commit` and `dirty` (SHA-256 of the uncommitted diff, "" when clean) are "" outside a git checkout.
    """
    commit, dirty = git_state(root)
    return {"commit": commit, "dirty": dirty, "modules": module_digests(source_file(function), root)}


def git_state(root: Path = ROOT) -> tuple[str, str]:
    """`(commit, digest of the uncommitted diff)` of the checkout at `root`; ("", "") when it is none."""
    # An installed copy may lie inside somebody else's checkout: ours is one that tracks this very file.
    tracked = _git(root, "ls-files", "--error-unmatch", Path(__file__).resolve().relative_to(ROOT).as_posix())
    commit = _git(root, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return "", ""
    diff = _git(root, "diff", "HEAD", "--no-ext-diff", "--binary")
    return commit.decode().strip(), sha256_bytes(diff) if diff else ""


def _git(root: Path, *arguments: str) -> bytes | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(
            [git, "-C", str(root), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
