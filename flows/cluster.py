"""The `cluster` part of a preset: the machines that its training is laid out for, and what they cost.

All of it is placement: it decides where and how fast a model is trained and served, never which model.
`headwater plan` reads it beside the nodes that train; what those say (model, tokens, batch, precision) is not
said again here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.config import Section


class ServingUnit(Section):
    """GPUs that serve together, with one copy of the model's experts among them."""

    gpus: int = Field(0, ge=0, description="GPUs of the unit; 0 = serving is not planned")
    tensor: int = Field(1, gt=0, description="GPUs that share a request's attention (TP)")
    slots: int = Field(1, gt=0, description="Experts that a GPU holds a layer, redundant copies included")
    shared_as_routed: bool = Field(False, description="The shared expert has slots of its own")


class ServedTraffic(Section):
    """Requests that the serving units are sized for."""

    requests_per_second: float = Field(100.0, gt=0, description="Requests that arrive a second")
    prompt: int = Field(4096, gt=0, description="Tokens of a prompt")
    output: int = Field(1024, gt=0, description="Tokens of an answer")
    cached: float = Field(0.0, ge=0, description="Tokens of a prompt that are found in a cache")


class ClusterConfig(Section):
    """Machines, the layout on them, and prices."""

    machine: str = Field("h100", description="Name of a machine, or a JSON file that describes one")
    gpus: int = Field(1, gt=0, description="GPUs that train")
    pipeline: int = Field(1, gt=0, description="Pipeline stages (PP)")
    expert: int = Field(1, gt=0, description="GPUs that share the experts of a layer (EP)")
    zero: int = Field(1, ge=0, le=3, description="ZeRO stage: 1 shards the optimizer's state")
    schedule: Literal["1f1b", "zb1p", "dualpipe", "dualpipev"] = Field(
        "1f1b", description="Order in which a pipeline works off its micro-batches"
    )
    recompute: list[str] = Field(
        default_factory=list,
        description="What is made again going back: norms, swiglu, mla_up, router, attention_output, full; "
        "empty = what pretrain.recompute does",
    )
    price: float = Field(2.0, ge=0, description="Dollars a GPU-hour")
    stated_hours: dict[str, float] = Field(
        default_factory=dict,
        description="GPU-hours of phases that are stated from outside: shown as such, not computed",
    )
    prefill: ServingUnit = Field(ServingUnit(), description="A unit that reads prompts")
    decode: ServingUnit = Field(ServingUnit(), description="A unit that writes answers")
    traffic: ServedTraffic = Field(ServedTraffic(), description="What the units serve")
