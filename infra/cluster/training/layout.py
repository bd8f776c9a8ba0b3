"""How a training run lies on GPUs: pipeline, expert, data and tensor parallelism, ZeRO, batch, precision.

A layout that cannot run is refused with the reason and the nearest value that can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

from infra.cluster.shape import ModelShape
from infra.errors import ConfigError

SCHEDULES = ("dualpipe", "dualpipev", "1f1b", "zb1p")
PRECISIONS = ("fp8", "bf16", "fp32")
RECOMPUTED = ("norms", "swiglu", "mla_up", "router", "attention_output", "full")
"""What may be made again in the backward pass. `norms`, `swiglu` and `mla_up`: outputs of RMSNorm, of SwiGLU
and of MLA's up-projections. `router`: the FP32 copy of a norm's output that the router reads.
`attention_output`: under `fp8`, attention's backward pass reads its output from the E5M6 copy that the next
layer keeps. `full`: all of a layer but its input."""
REPORT_RECOMPUTES = frozenset({"norms", "swiglu", "mla_up", "router", "attention_output"})
"""The report's policy (§3.2.3, §3.3.3)."""
MODEL_RECOMPUTES = frozenset({"norms", "swiglu", "mla_up"})
"""What `model/` can do."""


Fault = tuple[str, str]
"""The field that is wrong, and why."""


@dataclass(frozen=True)
class Layout:
    """A training run's layout; the defaults are the report's (§3.2, §4.2).

    Ranks are numbered within a group of pipeline x data x tensor GPUs. Every GPU of a pipeline rank holds
    that rank's layers; its experts are spread over groups of `expert` GPUs. `expert` is judged by `check`:
    only with the model can a value be named that fits.

    Raises:
        ConfigError: the fields do not fit each other; says which value would.
    """

    gpus: int = 2048
    pipeline: int = 16
    """Pipeline ranks, PP."""
    expert: int = 64
    """GPUs that one copy of a layer's experts lies on, EP."""
    tensor: int = 1
    """GPUs that share one sequence: attention by heads, dense networks by width, all else by positions."""
    zero: int = 1
    """ZeRO stage: what replicas share out. 1 the optimizer's state, 2 gradients too, 3 weights too."""
    schedule: str = "dualpipe"
    micro_batch: int = 1
    """Sequences of a micro-batch on one data-parallel rank."""
    length: int = 4096
    """Tokens of a sequence."""
    global_batch: int = 15360
    """Sequences of an optimizer step."""
    precision: str = "fp8"
    recompute: frozenset[str] = REPORT_RECOMPUTES
    """Some of `RECOMPUTED`."""
    moments: str = "bf16"
    """Format of the optimizer's moments: bf16 or fp32."""
    layers: tuple[int, ...] = ()
    """Layers of each stage, in order; empty for the most even split (`infra.cluster.training.stages`)."""

    def __post_init__(self) -> None:
        # Lists are what a file of settings holds.
        object.__setattr__(self, "recompute", frozenset(self.recompute))
        object.__setattr__(self, "layers", tuple(self.layers))
        _refuse(self, _faults, later=("expert",))

    @property
    def data(self) -> int:
        """Data-parallel replicas of a pipeline, DP."""
        return self.gpus // (self.pipeline * self.tensor)

    @property
    def rank_gpus(self) -> int:
        """GPUs of one pipeline rank."""
        return self.gpus // self.pipeline

    @property
    def expert_replicas(self) -> int:
        """Copies of each expert among the GPUs of a pipeline rank."""
        return self.rank_gpus // self.expert

    @property
    def stages(self) -> int:
        """Pieces that the layers are cut into: DualPipeV gives each rank two."""
        return 2 * self.pipeline if self.schedule == "dualpipev" else self.pipeline

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a pipeline in one step, both directions together: 120 in the report's layout."""
        return self.global_batch // (self.data * self.micro_batch)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch * self.length

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch that lie on one GPU."""
        return self.micro_batch * self.length // self.tensor

    def held(self, rank: int) -> tuple[int, ...]:
        """Stages that a pipeline rank holds. DualPipe runs micro-batches from both ends, so each stage lies
        on two ranks; in both bidirectional schedules first and last stage share a rank (§3.2.3)."""
        if self.schedule == "dualpipe":
            return (rank, self.pipeline - 1 - rank)
        if self.schedule == "dualpipev":
            return (rank, self.stages - 1 - rank)
        return (rank,)

    def check(self, shape: ModelShape, gpus_per_node: int = 8) -> None:
        """Whether a model fits this layout on nodes of `gpus_per_node` GPUs.

        A group of `expert` GPUs need not fill nodes: it lies in equal parts on as few as can hold it
        (`infra.cluster.network.even_split`), and what leaves a node is a matter of time.

        Raises:
            ConfigError: it does not; says which value would.
        """
        _refuse(self, lambda layout: _faults_with(layout, shape, gpus_per_node))

    def changed(self, shape: ModelShape, gpus_per_node: int = 8, **changes: Any) -> Layout | None:
        """The layout with some fields changed, or None where a model does not fit that."""
        other = _with(self, **changes)
        return None if _faults_with(other, shape, gpus_per_node) else other


def _faults(layout: Layout) -> list[Fault]:
    """All that is wrong with a layout by itself."""
    # What follows divides by values, and schedules by what divides.
    return _values(layout) or _divisions(layout) or _schedules(layout) + _groups(layout)


def _faults_with(layout: Layout, shape: ModelShape, gpus_per_node: int) -> list[Fault]:
    """All that is wrong with a layout for a model."""
    if wrong := _values(layout):
        return wrong
    return _faults(layout) + list(_model(layout, shape))


def _values(layout: Layout) -> list[Fault]:
    faults = []
    for name in ("gpus", "pipeline", "expert", "tensor", "micro_batch", "length", "global_batch"):
        value = getattr(layout, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append((name, "it must be a whole number of at least 1"))
    for name, known in _CHOICES.items():
        if getattr(layout, name) not in known:
            faults.append((name, f"choose one of {', '.join(str(value) for value in known)}"))
    unknown = sorted(layout.recompute - set(RECOMPUTED))
    if unknown:
        faults.append(("recompute", f"{unknown[0]} is unknown; choose from {', '.join(RECOMPUTED)}"))
    return faults


_CHOICES: dict[str, tuple[Any, ...]] = {
    "zero": (0, 1, 2, 3),
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "moments": ("bf16", "fp32"),
}


def _divisions(layout: Layout) -> list[Fault]:
    x, faults = layout, []
    if x.gpus % x.pipeline:
        near = max(1, round(x.gpus / x.pipeline)) * x.pipeline
        return [("pipeline", f"{x.gpus} GPUs do not divide into as many ranks ({near} would)")]
    if x.rank_gpus % x.tensor:
        faults.append(("tensor", _undivided(x)))
    if x.length % x.tensor:
        faults.append(("length", f"a sequence does not divide over tensor={x.tensor} GPUs"))
    together = x.data * x.micro_batch
    if together and x.global_batch % together:
        reason = (
            f"it does not divide into micro-batches of {x.micro_batch} on {x.data} data-parallel ranks, "
            f"{together} sequences at a time"
        )
        faults.append(("global_batch", reason))
    return faults


def _groups(layout: Layout) -> list[Fault]:
    return [("expert", _undivided(layout))] if layout.rank_gpus % layout.expert else []


def _undivided(layout: Layout) -> str:
    return f"the {layout.rank_gpus} GPUs of a pipeline rank do not divide into groups of it"


def _schedules(layout: Layout) -> list[Fault]:
    x, faults = layout, []
    if x.schedule == "dualpipe" and x.pipeline % 2:
        faults.append(("pipeline", "DualPipe pairs each rank with one at the other end: it must be even"))
    made = f"and the step has {x.micro_batches}"
    if x.schedule == "dualpipe" and x.micro_batches % 2:
        faults.append(("global_batch", f"DualPipe wants an even number of micro-batches, {made}"))
    if x.schedule in ("dualpipe", "dualpipev") and x.micro_batches < 2 * x.pipeline:
        reason = f"{x.schedule} wants at least 2 x pipeline = {2 * x.pipeline} micro-batches, {made}"
        faults.append(("global_batch", reason))
    if x.layers and len(x.layers) != x.stages:
        faults.append(("layers", f"it has {len(x.layers)} numbers for {x.stages} stages"))
    if min(x.layers, default=1) < 1:
        faults.append(("layers", "each stage needs a layer"))
    return faults


def _model(layout: Layout, shape: ModelShape) -> Iterator[Fault]:
    x, layers, heads = layout, shape.num_hidden_layers, shape.num_attention_heads
    if x.stages > layers:
        yield "pipeline", f"{x.stages} stages want a layer each, and there are {layers}"
    if x.layers and sum(x.layers) != layers:
        yield "layers", f"they are {sum(x.layers)} in all, and the model has {layers}"
    if heads % x.tensor:
        yield "tensor", f"{heads} attention heads do not divide over as many GPUs"
    if shape.n_routed_experts % x.expert:
        yield "expert", f"{shape.n_routed_experts} experts do not divide over as many GPUs"


def _refuse(layout: Layout, find: Callable[[Layout], list[Fault]], later: tuple[str, ...] = ()) -> None:
    """Raise ConfigError for the first fault, naming the nearest value of its field that mends it.

    Fields named `later` may be at fault here, but what is named for another fits them too, if it can.
    """
    faults = [fault for fault in find(layout) if fault[0] not in later]
    if not faults:
        return
    field, reason = faults[0]
    value = getattr(layout, field)
    nearest = _nearest(layout, field, find)
    advice = "" if nearest is None else f"; the nearest that {nearest[1]} is {nearest[0]}"
    shown = sorted(value) if isinstance(value, frozenset) else value
    raise ConfigError(f"layout.{field} is {shown}: {reason}{advice}")


def _nearest(layout: Layout, field: str, find: Callable[[Layout], list[Fault]]) -> tuple[int, str] | None:
    """The nearest value with which nothing is wrong, or else the nearest that is not at fault itself; and
    which of the two it is."""
    value = getattr(layout, field)
    if not isinstance(value, int):
        return None
    mending = None
    for candidate in sorted(_candidates(layout, field), key=lambda c: (abs(c - value), c)):
        faults = find(_with(layout, **{field: candidate}))
        if not faults:
            return candidate, "fits"
        if mending is None and field not in (at_fault for at_fault, _ in faults):
            mending = candidate, "mends this"
    return mending


def _candidates(layout: Layout, field: str) -> Iterable[int]:
    """Values of a field to try, few whatever the size; the nearest that fit are among them."""
    x = layout
    if field == "zero":
        return range(4)
    if field == "global_batch" and x.data * x.micro_batch > 0:
        step, least = x.data * x.micro_batch, 2 * x.pipeline
        near = x.global_batch // step
        return [step * n for n in {*range(near - 2, near + 4), *range(least, least + 3)} if n > 0]
    if field == "length":
        near = x.length // x.tensor
        return [x.tensor * n for n in (near, near + 1) if n > 0]
    if field == "pipeline":
        return _divisors(x.gpus)
    if field in ("expert", "tensor"):
        return _divisors(x.rank_gpus)
    return [1]


def _divisors(number: int) -> set[int]:
    """Of a number of GPUs, those above a million that have no partner below it left out."""
    small = [n for n in range(1, min(isqrt(number), 10**6) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


def _with(layout: Layout, **changes: Any) -> Layout:
    """A copy with other values, not checked."""
    other = copy.copy(layout)
    for field, value in changes.items():
        object.__setattr__(other, field, value)
    return other
