"""Presets: the pipeline as a named YAML file, a DAG of nodes that each use one stage.

A preset is read strictly: an unknown name anywhere is an error that says where and offers the nearest valid
names, so that a misspelt field never trains a model with its default. What comes out is typed and checked:
configs are instances of the stages' own classes, inputs point at nodes of fitting stages, and there is no
cycle.

    name: demo
    description: one line
    defaults: {seed: 0, threads: 1}        # laid under every node whose config has the field
    parallel: 2                            # nodes at once; left out: the DAG's width, up to the cores
    cluster: {machine: h800, gpus: 2048}   # what `headwater plan` lays the training out on
    stages: [my_stages]                    # folders with more stage files, relative to this file
    nodes:
      pack:
        stage: pack
        inputs: {documents: decontaminate, problems: [tasks], tokenizer: "@corpus/tokenizer"}
        config: {length: 256}
    promote: {name: chat, node: export, gates: [{node: eval_grpo, metric: format, at_least: 0.9}]}
    gates: [{name: RL helps, value: eval_grpo.pass_at_1 - eval_sft.pass_at_1, at_least: 0.1}]

An input that starts with `@` is a reference into the store instead of a node.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import registry
from flows.cluster import ClusterConfig
from flows.gates import Gate, Promotion, read_gates, read_promotion
from flows.overlay import read_yaml, validate
from infra.config import StageConfig
from infra.errors import ConfigError, StoreError, nearest
from infra.names import check_name
from infra.stage import Stage

_KEYS = ("name", "description", "defaults", "parallel", "cluster", "stages", "nodes", "promote", "gates")
_NODE_KEYS = ("stage", "inputs", "config")


@dataclass(frozen=True)
class Node:
    """A named use of a stage: where each role's inputs come from, and the resolved config."""

    name: str
    stage: Stage
    inputs: Mapping[str, tuple[str, ...]]
    config: StageConfig

    @property
    def parents(self) -> tuple[str, ...]:
        """The nodes that this one reads, without references into the store."""
        return tuple(
            dict.fromkeys(name for names in self.inputs.values() for name in names if name[0] != "@")
        )


@dataclass(frozen=True)
class Preset:
    """A whole pipeline; `nodes` are in an order in which each comes after what it reads."""

    name: str
    description: str
    nodes: Mapping[str, Node]
    parallel: int
    folders: tuple[Path, ...]
    promote: Promotion | None
    gates: tuple[Gate, ...]
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # How to load it again, "" for a preset that was put together in memory.
    source: str = ""
    sets: tuple[str, ...] = ()

    def node(self, name: str) -> Node:
        """The node of that name, or the only node of that stage."""
        if name in self.nodes:
            return self.nodes[name]
        of_stage = [node for node in self.nodes.values() if node.stage.name == name]
        if len(of_stage) == 1:
            return of_stage[0]
        if of_stage:
            raise ConfigError(
                f"preset {self.name} has several nodes of stage {name}: {_list(n.name for n in of_stage)}"
            )
        raise ConfigError(f"preset {self.name} has no node {name!r}; {nearest(name, self.nodes)}")

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """`names` and every node that they are made from."""
        found: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo.extend(self.nodes[name].parents)
        return found

    def descendants(self, names: Iterable[str]) -> set[str]:
        """`names` and every node that is made from them."""
        found = set(names)
        for node in self.nodes.values():  # parents first, so one pass is enough
            if found.intersection(node.parents):
                found.add(node.name)
        return found


def shipped() -> list[str]:
    """The names of the presets that come with Headwater."""
    folder = importlib.resources.files("flows") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load(name_or_path: str, sets: Sequence[str] = ()) -> Preset:
    """Read and check a preset, by name or from a YAML file, with `node.field.sub=value` settings laid over
    it.

    Raises ConfigError for an unknown preset, node, role or field, a value that the config class refuses, an
    input of the wrong kind, or a cycle.
    """
    text, where, folder = _source(name_or_path)
    document = read_yaml(text, where)
    if not isinstance(document, Mapping):
        raise ConfigError(f"{where}: a preset is a YAML mapping with {_list(_KEYS)}")
    _known(document, _KEYS, where)
    document = dict(document)
    name = _name(document.get("name", Path(where).stem), f"{where}: name")
    folders = tuple((folder / item).resolve() for item in _texts(document.get("stages"), f"{where}: stages"))
    stages = registry.stages(folders)
    raw = _mapping(document.get("nodes"), f"{where}: nodes")
    if not raw:
        raise ConfigError(f"{where}: nodes: a preset needs at least one node")
    defaults = dict(_mapping(document.get("defaults"), f"{where}: defaults"))
    cluster = dict(_mapping(document.get("cluster"), f"{where}: cluster"))
    settings = read_settings(sets)
    for path, value, text in settings:
        if path[0] in ("defaults", "cluster"):
            assign(defaults if path[0] == "defaults" else cluster, path[1:], value, text)
        elif path[0] not in raw:
            raise ConfigError(f"--set {text}: preset {name} has no node {path[0]!r}; {nearest(path[0], raw)}")
    nodes = {}
    for node_name, body in raw.items():
        own = [(path[1:], value, text) for path, value, text in settings if path[0] == node_name]
        nodes[node_name] = _node(node_name, body, defaults, own, stages, where)
    _check_defaults(defaults, nodes, where)
    _check_inputs(nodes, where)
    _check_shared(nodes, where)
    nodes = _sorted(nodes, where)
    return Preset(
        name=name,
        description=str(document.get("description", "")),
        nodes=nodes,
        parallel=_positive(document.get("parallel", 0), f"{where}: parallel"),
        folders=folders,
        promote=read_promotion(document.get("promote"), nodes, f"{where}: promote"),
        gates=read_gates(document.get("gates"), nodes, f"{where}: gates"),
        cluster=validate(ClusterConfig, cluster, f"{where}: cluster"),
        source=name_or_path if name_or_path in shipped() else str(Path(name_or_path).absolute()),
        sets=tuple(_as_taken(path, value, text, nodes) for path, value, text in settings),
    )


def _as_taken(path: Sequence[str], value: Any, text: str, nodes: Mapping[str, Node]) -> str:
    """A setting as its config took it: a relative path has become absolute, and means the same elsewhere."""
    node = nodes.get(path[0])
    taken = getattr(node.config, path[1], value) if node is not None and len(path) == 2 else value
    if isinstance(value, str) and isinstance(taken, str) and taken != value:
        return f"{'.'.join(path)}={json.dumps(taken, ensure_ascii=False)}"
    return text


def _source(name_or_path: str) -> tuple[str, str, Path]:
    """Text, how to call it in errors, and the folder that relative paths inside it mean."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8"), str(path), path.resolve().parent
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot read the preset: {error}") from None
    if name_or_path not in shipped():
        raise ConfigError(
            f"no preset named {name_or_path!r}; {nearest(name_or_path, shipped())} "
            "(or give the path of a .yaml file)"
        )
    resource = importlib.resources.files("flows") / "presets" / f"{name_or_path}.yaml"
    return resource.read_text(encoding="utf-8"), f"{name_or_path}.yaml", Path.cwd()


def _node(
    name: str,
    body: Any,
    defaults: Mapping[str, Any],
    sets: list[tuple[list[str], Any, str]],
    stages: Mapping[str, Stage],
    where: str,
) -> Node:
    place = f"{where}: nodes.{name}"
    if not isinstance(name, str) or not name.isidentifier() or name in ("defaults", "cluster"):
        raise ConfigError(
            f"{place}: a node's name is made of letters, digits and _ (and is not 'defaults' or 'cluster')"
        )
    body = _mapping(body, place)
    _known(body, _NODE_KEYS, place)
    kind = body.get("stage", name)
    if not isinstance(kind, str) or kind not in stages:
        raise ConfigError(f"{place}.stage: no stage named {kind!r}; {nearest(str(kind), stages)}")
    stage = stages[kind]
    config = {field: value for field, value in defaults.items() if field in stage.config.model_fields}
    config.update(_mapping(body.get("config"), f"{place}.config"))
    resolved = validate(stage.config, config, f"{place}.config")
    if sets:
        for path, value, text in sets:
            assign(config, path, value, text)
        texts = ", ".join(text for _, _, text in sets)
        resolved = validate(stage.config, config, f"--set {texts}: {name}")
    return Node(name, stage, _inputs(body.get("inputs"), stage, place), resolved)


def _inputs(given: Any, stage: Stage, place: str) -> dict[str, tuple[str, ...]]:
    inputs: dict[str, tuple[str, ...]] = {}
    for role, names in _mapping(given, f"{place}.inputs").items():
        if role not in stage.inputs:
            raise ConfigError(
                f"{place}.inputs.{role}: stage {stage.name} has no such input; "
                f"{nearest(str(role), stage.inputs)}"
            )
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
            raise ConfigError(
                f"{place}.inputs.{role}: expected a node's name or a list of them, got {names!r}"
            )
        if len(listed) > 1 and not stage.inputs[role].many:
            raise ConfigError(f"{place}.inputs.{role}: takes one input, got {len(listed)}")
        if len(set(listed)) < len(listed):
            raise ConfigError(f"{place}.inputs.{role}: the same input twice: {_list(listed)}")
        inputs[role] = tuple(listed)
    for role, spec in stage.inputs.items():
        if not spec.optional and not inputs.get(role):
            raise ConfigError(
                f"{place}.inputs.{role}: missing; it comes from a node of stage {_list(spec.stages)}"
            )
    return inputs


def _check_inputs(nodes: Mapping[str, Node], where: str) -> None:
    for node in nodes.values():
        for role, names in node.inputs.items():
            allowed = node.stage.inputs[role].stages
            for name in names:
                place = f"{where}: nodes.{node.name}.inputs.{role}"
                if name[0] == "@":
                    continue
                if name not in nodes:
                    raise ConfigError(f"{place}: no node named {name!r}; {nearest(name, nodes)}")
                if nodes[name].stage.name not in allowed:
                    raise ConfigError(
                        f"{place}: {name} is a node of stage {nodes[name].stage.name}; "
                        f"this input takes {_list(allowed)}"
                    )


def _check_shared(nodes: Mapping[str, Node], where: str) -> None:
    first: dict[str, Node] = {}
    for node in nodes.values():
        other = first.setdefault(node.stage.name, node)
        for name in node.stage.shared:
            one, two = (getattr(each.config, name) for each in (other, node))
            if one != two:
                raise ConfigError(
                    f"{where}: nodes.{other.name} and nodes.{node.name}: {name} is {one!r} and {two!r}; "
                    f"all nodes of stage {node.stage.name} in a preset must have the same "
                    f"(set defaults.{name})"
                )


def _check_defaults(defaults: Mapping[str, Any], nodes: Mapping[str, Node], where: str) -> None:
    known = {name for node in nodes.values() for name in node.stage.config.model_fields}
    for name in defaults:
        if name not in known:
            raise ConfigError(
                f"{where}: defaults.{name}: no stage of this preset has it; {nearest(str(name), known)}"
            )


def _sorted(nodes: Mapping[str, Node], where: str) -> dict[str, Node]:
    """Parents first, otherwise in the order of the file. A cycle is an error that spells it out."""
    done: dict[str, Node] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in path:
            raise ConfigError(f"{where}: nodes: a cycle: {' -> '.join([*path[path.index(name) :], name])}")
        path.append(name)
        for parent in nodes[name].parents:
            visit(parent)
        path.pop()
        done[name] = nodes[name]

    for name in nodes:
        visit(name)
    return done


def read_settings(sets: Sequence[str]) -> list[tuple[list[str], Any, str]]:
    """`node.field.sub=value` texts as (path, value, text); the value is YAML."""
    return [_setting(text) for text in sets]


def _setting(text: str) -> tuple[list[str], Any, str]:
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"--set {text}: expected node.field=value, for example --set pretrain.seed=1")
    return path, read_yaml(value, f"--set {text}"), text


def assign(config: dict[str, Any], path: Sequence[str], value: Any, text: str) -> None:
    """Set one nested value in what the YAML gave; the config class judges the result."""
    here: Any = config
    for index, part in enumerate(path):
        last = index == len(path) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise ConfigError(f"--set {text}: {part!r} is not a place in a list of {len(here)}")
            key: Any = int(part)
        else:
            key = part
        if last:
            here[key] = value
            return
        below = here[key] if isinstance(here, list) else here.get(key)
        # Copied on the way down: the YAML may share one mapping between nodes by an anchor.
        below = list(below) if isinstance(below, list) else dict(below) if isinstance(below, Mapping) else {}
        here[key] = below
        here = below


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}: expected a mapping, got {value!r}")
    return value


def _name(value: Any, place: str) -> str:
    """A preset's name, which its runs are called by too."""
    try:
        return check_name(str(value), single=True)
    except StoreError as error:
        raise ConfigError(f"{place}: {error}") from None


def _texts(value: Any, place: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{place}: expected a list of texts, got {value!r}")
    return value


def _known(given: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for key in given:
        if key not in names:
            raise ConfigError(f"{where}.{key}: no such key; {nearest(str(key), names)}")


def _positive(value: Any, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{place}: expected a whole number of nodes, got {value!r}")
    return value


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
