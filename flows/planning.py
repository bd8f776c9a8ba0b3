"""From a preset to what the planner is asked: the model, batch and precision of the nodes that train, and the
machines of the preset's `cluster`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from flows.cluster import ClusterConfig, ServingUnit
from flows.preset import Node, Preset
from infra.cluster.machines import Machine, load_machine
from infra.cluster.pipeline.times import StageTimes
from infra.cluster.plan import Plan, Request, plan
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.disaggregation import Traffic
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import MODEL_RECOMPUTES, Layout
from infra.cluster.training.levers import Fit
from infra.cluster.training.phases import TrainingPhase
from infra.cluster.training.search import Space
from infra.errors import ConfigError


def planned(preset: Preset, times: StageTimes | None = None) -> Plan:
    """Plan the training and serving of a preset's model, with pretraining's durations from a trace if given.

    Raises ConfigError for a preset that pretrains nothing, and for a layout that cannot run, naming the field
    and the nearest value that can.
    """
    nodes = list(preset.nodes.values())
    node, cluster = _pretrain(preset), preset.cluster
    config = node.config
    length = _length(preset, node)
    machine = load_machine(cluster.machine)
    phases = [
        (
            node,
            TrainingPhase(
                "pretraining",
                config.tokens,
                length,
                config.batch_rows,
                config.micro_rows,
                **_kept(preset, config),
            ),
        )
    ]
    for other in nodes:
        if other.stage.name == "extend":
            rows, own = _length(preset, other), other.config
            for number, phase in enumerate(own.phases):
                name = other.name if len(own.phases) == 1 else f"{other.name} {number + 1}"
                tokens = phase.steps * own.batch_rows * rows
                kept = _kept(preset, own)
                phases.append(
                    (other, TrainingPhase(name, tokens, rows, own.batch_rows, own.micro_rows, **kept))
                )
    try:
        layout = Layout(
            gpus=cluster.gpus,
            pipeline=cluster.pipeline,
            expert=cluster.expert,
            zero=cluster.zero,
            schedule=cluster.schedule,
            micro_batch=config.micro_rows,
            length=length,
            global_batch=config.batch_rows,
            **_kept(preset, config),
        )
        made = plan(
            Request(
                title=f"Plan of {preset.name}",
                subtitle=f"{preset.description} {cluster.gpus:,} x {machine.name}.",
                shape=config.model,
                layout=layout,
                machine=machine,
                phases=tuple(phase for _, phase in phases),
                price=cluster.price,
                stated_hours=cluster.stated_hours,
                prefill=_unit("prefill", cluster.prefill),
                decode=_unit("decode", cluster.decode),
                traffic=Traffic(**cluster.traffic.model_dump()),
                times=times,
            )
        )
    except ConfigError as error:
        raise ConfigError(f"preset {preset.name}: {_as_set(str(error), preset, node)}") from None
    extensions = tuple(
        replace(
            each,
            problem=_as_set(each.problem, preset, other),
            fit=each.fit and _levers_as_set(each.fit, preset, other),
        )
        for each, (other, _) in zip(made.extensions, phases[1:], strict=True)
    )
    return replace(made, fit=_levers_as_set(made.fit, preset, node), extensions=extensions)


def _kept(preset: Preset, config: Any) -> dict[str, Any]:
    """Formats that a node trains in, and what it makes again going back."""
    again = frozenset(preset.cluster.recompute) or (MODEL_RECOMPUTES if config.recompute else frozenset())
    return {"precision": config.precision, "moments": config.moments, "recompute": again}


def searched(preset: Preset) -> tuple[ModelShape, Space, Machine]:
    """What a search for layouts of a preset's pretraining is given.

    Raises ConfigError for a preset that pretrains nothing.
    """
    node = _pretrain(preset)
    config, cluster = node.config, preset.cluster
    space = Space(
        gpus=cluster.gpus,
        length=_length(preset, node),
        global_batch=config.batch_rows,
        zero=cluster.zero,
        **_kept(preset, config),
    )
    return config.model, space, load_machine(cluster.machine)


def _pretrain(preset: Preset) -> Node:
    found = [node for node in preset.nodes.values() if node.stage.name == "pretrain"]
    if not found:
        raise ConfigError(f"preset {preset.name} has no node of stage pretrain: there is nothing to plan")
    return found[0]


def _as_set(text: str, preset: Preset, node: Node) -> str:
    """A message of the planner with the names of settings in place of the layout's."""
    names = {
        "micro_batch": f"{node.name}.micro_rows",
        "global_batch": f"{node.name}.batch_rows",
        "precision": f"{node.name}.precision",
        "moments": f"{node.name}.moments",
    }
    packed = [name for name in node.inputs.get("shards", ()) if name in preset.nodes]
    if packed:
        names["length"] = f"{packed[0]}.sequence_length"
    names |= {name: f"cluster.{name}" for name in ClusterConfig.model_fields}
    return re.sub(r"\blayout\.(\w+)", lambda found: names.get(found[1], found[0]), text)


def _levers_as_set(fit: Fit, preset: Preset, node: Node) -> Fit:
    """The same with changes of settings in place of the layout's."""
    if not fit.levers:
        return fit
    levers = [replace(lever, change=_as_set(lever.change, preset, node)) for lever in fit.levers]
    return replace(fit, levers=tuple(levers))


def _length(preset: Preset, node: Node) -> int:
    """Tokens of the rows that a node trains on: those of its shards, or the model's context."""
    for name in node.inputs.get("shards", ()):
        if name in preset.nodes:
            return int(preset.nodes[name].config.sequence_length)
    model = getattr(node.config, "model", None)
    if model is None:
        raise ConfigError(
            f"preset {preset.name}: {node.name} reads shards from outside of the preset, so the length of "
            "its rows is not known: plan a preset that packs them"
        )
    return int(model.original_max_position_embeddings)


def _unit(name: str, unit: ServingUnit) -> Deployment | None:
    if not unit.gpus:
        return None
    return Deployment(
        f"{name}, EP{unit.gpus}", unit.gpus, unit.tensor, unit.slots, shared_as_routed=unit.shared_as_routed
    )
