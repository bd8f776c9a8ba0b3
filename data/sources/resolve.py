"""From the words of a configuration to sources."""

import os
from pathlib import Path

from data.sources.arrow import DatasetsSource
from data.sources.base import Source
from data.sources.stdlib import StdlibSource
from data.sources.sysdocs import SysdocsSource
from data.sources.tree import FileSource, GitSource, TreeSource
from data.sources.words import BUILTIN, DATASETS
from infra.errors import ConfigError

_KNOWN = "builtin, stdlib, sysdocs, datasets:<name or folder>, a folder, a git checkout or a file"


def resolve(words: str, split: str = "train", subset: str = "") -> list[Source]:
    """The sources named by a comma-separated list.

    `builtin` stands for `stdlib,sysdocs`; `datasets:<name>` goes to the `datasets` library; anything else
    is a path. A path with a comma in it works when it is the only source. Raises ConfigError for what
    does not exist.
    """
    # os.path takes an unknown ~user or an overlong name for a path that does not exist; pathlib raises.
    if os.path.exists(os.path.expanduser(words)):
        return [_from_path(words)]
    sources: list[Source] = []
    for word in (part.strip() for part in words.split(",")):
        if not word:
            continue
        if word in ("builtin", "stdlib"):
            sources.append(StdlibSource())
        if word in ("builtin", "sysdocs"):
            sources.append(SysdocsSource())
        if word.startswith(DATASETS):
            sources.append(DatasetsSource(word.removeprefix(DATASETS), split, subset))
        elif word not in BUILTIN:
            sources.append(_from_path(word))
    if not sources:
        raise ConfigError(f"sources is empty; give {_KNOWN}")
    return sources


def _from_path(word: str) -> Source:
    path = Path(os.path.expanduser(word))
    if os.path.isdir(path):
        return GitSource(path) if os.path.exists(path / ".git") else TreeSource(path)
    if os.path.exists(path):
        return FileSource(path)
    asked = "" if os.path.isabs(word) else f" in {os.getcwd()} (a path from another folder must be absolute)"
    raise ConfigError(
        f"sources: there is no {word!r}{asked}; give {_KNOWN}, or a comma-separated list of these"
    )
