"""The stages that exist: one file each under `flows/stages/`, found by looking, never by a hand-kept list.

A stage file defines exactly one `STAGE`, whose name is the file's name. Importing it must cost nothing
heavy: the command line, the forms and the presets read the configs of all stages, and none of them may wait
for torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from infra.errors import ConfigError
from infra.stage import Stage

PACKAGE = "flows.stages"
FOLDER = Path(__file__).parent / "stages"


def stages(folders: Iterable[Path] = ()) -> dict[str, Stage]:
    """All stages by name: Headwater's own, then those of `folders` (a preset may bring its own stage files).

    Raises ConfigError when a file defines no stage, more than one, one of another name, or a name that is
    taken.
    """
    found = {
        path.stem: _stage(importlib.import_module(f"{PACKAGE}.{path.stem}"), path) for path in _files(FOLDER)
    }
    for folder in folders:
        for path in _files(_existing(folder)):
            if path.stem in found:
                raise ConfigError(
                    f"{path}: a stage named {path.stem!r} exists already; rename the file and its STAGE"
                )
            found[path.stem] = _stage(_load(path), path)
    return found


def stage(name: str, folders: Iterable[Path] = ()) -> Stage:
    """One stage, importing only its own file (a worker process needs no other)."""
    own = FOLDER / f"{name}.py"
    if own in _files(FOLDER):
        return _stage(importlib.import_module(f"{PACKAGE}.{name}"), own)
    for folder in folders:
        path = _existing(folder) / f"{name}.py"
        if path.is_file():
            return _stage(_load(path), path)
    raise ConfigError(
        f"no stage named {name!r}: {FOLDER} holds {', '.join(p.stem for p in _files(FOLDER)) or 'none'}"
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of stage files")
    return folder.resolve()


def _load(path: Path) -> ModuleType:
    # The folder is part of the module's name: two presets may each bring a `clean.py`.
    name = f"headwater_stages_{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _stage(module: ModuleType, path: Path) -> Stage:
    found = {name: value for name, value in vars(module).items() if isinstance(value, Stage)}
    if list(found) != ["STAGE"]:
        raise ConfigError(
            f"{path}: a stage file defines exactly one STAGE; this one defines {', '.join(found) or 'none'}"
        )
    if found["STAGE"].name != path.stem:
        raise ConfigError(
            f"{path}: STAGE is named {found['STAGE'].name!r}; it must be {path.stem!r}, the file's name"
        )
    return found["STAGE"]
