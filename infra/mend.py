"""What to do about an artifact whose files are no longer what was published."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.store import Store


def advice(store: Store, ref: str) -> str:
    """How to build an artifact again: the full command, where a run says what it was built from."""
    unread: list[str] = []
    for run, document in store.names.runs(unread).items():
        if "preset" not in document["info"]:
            continue
        for node, entry in document["nodes"].items():
            if _same_build(ref, entry["artifact"]):
                command = rebuild_command(store, run, document["info"], node)
                return f"restore the file, or build {ref} again: {command}"
    stage = ref.partition("@")[0]
    return (
        f"restore the file, or build {ref} again: the command that made it (stage {stage}), with --force; "
        "no run of a preset holds it"
    )


def _same_build(one: str, two: str) -> bool:
    """Whether two references are attempts of one fingerprint."""
    return one.partition("-")[0] == two.partition("-")[0]


def rebuild_command(store: Store, run: str, info: dict[str, Any], node: str) -> str:
    """The command that makes a new attempt of one node of a run, as the run's document describes it."""
    words = ["headwater", "--home", str(store.home), "run", "--preset", info["preset"]]
    words += ["--run", run] if run != info.get("name") else []
    words += [word for text in info.get("sets", []) for word in ("--set", text)]
    return shlex.join([*words, "--from", node, "--to", node, "--force"])
