"""One node on its own: a stage run again with other settings, its inputs taken from a run or given by
reference.

The node is put into a preset of one, so that everything else (caching, workers, records) is the same as in a
run. Its result becomes the newest attempt of that node: `demo/sft` then means the new one, the earlier one
stays in the store and in the run's history, and running the preset again points `demo/sft` back at it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.cluster import ClusterConfig
from flows.overlay import validate
from flows.preset import Node, Preset, assign, load, read_settings
from flows.runner import places
from infra.config import StageConfig
from infra.errors import ConfigError, nearest
from infra.stage import Stage
from infra.store import Store

# The run under which a stage that belongs to none is recorded.
NO_RUN = "single"


def from_run(
    store: Store,
    run: str,
    name: str,
    sets: Sequence[str] = (),
    refs: Mapping[str, Sequence[str]] | None = None,
) -> Preset:
    """The node `name` (or the only one of that stage) as the run's preset describes it, `sets` laid over.

    Each input is the newest attempt of the node it comes from in that run, or what `refs` gives for its role.
    Raises StoreError for an unknown run, ConfigError for an unknown node, field or role, or a setting of
    another node.
    """
    info = store.names.require_run(run)["info"]
    if "preset" not in info:
        raise ConfigError(f"run {run} was not made from a preset: give the stage's inputs with --input")
    full = load(info["preset"], [*info.get("sets", []), *sets])
    node = full.node(name)
    for path, _, text in read_settings(sets):
        if path[0] not in (node.name, "defaults", "cluster"):
            raise ConfigError(f"--set {text}: this builds {node.name} alone and takes {path[0]} as it is")
    inputs = {
        role: tuple(one if one[0] == "@" else f"@{run}/{one}" for one in names)
        for role, names in node.inputs.items()
    }
    inputs |= _references(node.stage, refs or {})
    # The share of the machine is that of the run, so that threads, and with them the bits, are the same.
    return _one(dataclasses.replace(node, inputs=inputs), full.folders, places(full), full.cluster)


def from_stage(
    stage: Stage,
    sets: Sequence[str] = (),
    refs: Mapping[str, Sequence[str]] | None = None,
    config: StageConfig | None = None,
    name: str = "",
    folders: tuple[Path, ...] = (),
) -> Preset:
    """A stage with its own defaults or `config`, and all its inputs given by reference."""
    given: dict[str, object] = {}
    for path, value, text in read_settings(sets):
        if path[0] not in (stage.name, name):
            raise ConfigError(f"--set {text}: this builds {name or stage.name} alone")
        assign(given, path[1:], value, text)
    resolved = config if config is not None else validate(stage.config, given, stage.name)
    inputs = _references(stage, refs or {})
    for role, spec in stage.inputs.items():
        if not spec.optional and not inputs.get(role):
            raise ConfigError(
                f"{stage.name} needs {role} (from {' or '.join(spec.stages)}): give a reference, or a run"
            )
    return _one(Node(name or stage.name, stage, inputs, resolved), folders, 1)


def _references(stage: Stage, refs: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    for role in refs:
        if role not in stage.inputs:
            raise ConfigError(f"stage {stage.name} has no input {role!r}; {nearest(role, stage.inputs)}")
    return {role: tuple(f"@{ref}" for ref in listed) for role, listed in refs.items() if listed}


def _one(
    node: Node, folders: tuple[Path, ...], parallel: int, cluster: ClusterConfig | None = None
) -> Preset:
    return Preset(
        name=node.name,
        description=node.stage.description,
        nodes={node.name: node},
        parallel=parallel,
        folders=folders,
        promote=None,
        gates=(),
        cluster=cluster or ClusterConfig(),
    )
