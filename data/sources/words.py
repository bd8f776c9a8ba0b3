"""The words of `ingest.sources` as they are recorded: paths made absolute.

Apart from data.sources.resolve, because a configuration is read where nothing heavy may be imported.
"""

import os

BUILTIN = ("builtin", "stdlib", "sysdocs")
DATASETS = "datasets:"


def absolute(words: str) -> str:
    """The same sources, whatever folder they are asked for from. What does not exist is left as it is."""
    # os.path takes an unknown ~user or an overlong name for a path that does not exist; pathlib raises.
    if os.path.exists(os.path.expanduser(words)):
        return os.path.abspath(os.path.expanduser(words))
    return ",".join(_absolute(part.strip()) for part in words.split(","))


def _absolute(word: str) -> str:
    path = os.path.expanduser(word.removeprefix(DATASETS))
    if not word or word in BUILTIN or not os.path.exists(path):
        return word
    prefix = DATASETS if word.startswith(DATASETS) else ""
    return prefix + os.path.abspath(path)
