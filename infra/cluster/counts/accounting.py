"""Parameters, operations and cache of a model, by component: one place for all of the arithmetic.

Counts follow from a `ModelShape` alone, so they hold for models that fit no machine here. A multiply-add is
two operations; going back takes twice the forward pass (checked against 250 GFLOP a token, ISCA'25 table 2).
Nothing imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from infra.cluster.counts.shapes import GroupedQueryShape
from infra.cluster.counts.weights import (
    Part,
    Weight,
    all_mtp_weights,
    head_weights,
    layer_weights,
    main_weights,
    mtp_weights,
)
from infra.cluster.shape import ModelShape

VALUE_BYTES: Mapping[str, float] = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Bytes of one value, scales not counted."""


@dataclass(frozen=True)
class Elements:
    """Elements of weights: all of them, and those that one token meets."""

    total: int = 0
    active: int = 0

    def __add__(self, other: Elements) -> Elements:
        return Elements(self.total + other.total, self.active + other.active)


@dataclass(frozen=True)
class Parameters:
    """Elements of a model's weights. The MTP modules are apart: they share the main model's embedding and
    head, and are dropped after training."""

    parts: Mapping[Part, Elements]
    """The main model by component; of the embedding a token meets one row."""
    mtp: Elements
    """What the MTP modules add, without their routing biases."""

    @property
    def total(self) -> int:
        """Trained weights of the main model: 671,026,404,352 at the report's shape."""
        return sum(part.total for name, part in self.parts.items() if name is not Part.BIASES)

    @property
    def checkpoint(self) -> int:
        """Elements of the main model's published file, which holds the routing biases too."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """What one token is multiplied with, the head included and the input embedding not: the report's
        37B (36.63B)."""
        counted = (p for name, p in self.parts.items() if name not in (Part.BIASES, Part.EMBEDDING))
        return sum(part.active for part in counted)

    @property
    def active_with_embedding(self) -> int:
        """The same with the whole embedding table (37.55B). The weights' readme says 36.7B for this, which
        its own configuration does not give."""
        return self.active + self.parts[Part.EMBEDDING].total

    @property
    def active_without_head(self) -> int:
        """Neither embedding nor head: 35.70B."""
        return self.active - self.parts[Part.HEAD].active


def parameters(shape: ModelShape) -> Parameters:
    """All weights of a model, by component."""
    modules = (w for w in all_mtp_weights(shape) if w.trained)
    return Parameters(by_part(main_weights(shape)), sum((_elements(w) for w in modules), Elements()))


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, Elements]:
    """The weights of one layer by name, each projection of attention apart: `self_attn.q_a_proj`, ..."""
    return {w.name: _elements(w) for w in layer_weights(shape, layer, prefix="")}


def by_part(weights: Iterable[Weight]) -> dict[Part, Elements]:
    """Sums of `weights` by component, all components, in the order of `Part`."""
    sums = {part: Elements() for part in Part}
    for weight in weights:
        sums[weight.part] += _elements(weight)
    return sums


def _elements(weight: Weight) -> Elements:
    return Elements(weight.elements, weight.active if weight.trained else 0)


@dataclass(frozen=True)
class Operations:
    """Operations a token by component, a multiply-add being two. Norms and other element-wise work are not
    counted."""

    attention_core: float = 0.0
    """Scores and weighted sums of values."""
    attention_projections: float = 0.0
    dense: float = 0.0
    router: float = 0.0
    routed_experts: float = 0.0
    shared_experts: float = 0.0
    head: float = 0.0
    mtp: float = 0.0
    """The MTP modules as a whole: their layer, what joins their inputs, and the head once more each."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: float) -> Operations:
        return Operations(*(factor * getattr(self, f.name) for f in fields(self)))


def attention_core(shape: ModelShape, length: int, causal: bool = True) -> float:
    """Forward operations a token of one layer's attention itself, the mean over a row of `length` tokens:
    with `causal`, a token meets (length + 1) / 2 others, else all."""
    widths = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim
    return 2.0 * shape.num_attention_heads * widths * ((length + 1) / 2 if causal else length)


def layer_operations(shape: ModelShape, layer: int, length: int, causal: bool = True) -> Operations:
    """Forward operations a token of one layer."""
    return Operations(attention_core(shape, length, causal)) + _products(layer_weights(shape, layer))


def head_operations(shape: ModelShape) -> Operations:
    """Forward operations a token of the output head."""
    return _products(head_weights(shape))


def mtp_operations(shape: ModelShape, depth: int, length: int, causal: bool = True) -> Operations:
    """Forward operations a token of one MTP module and its pass through the head."""
    products = 2.0 * sum(w.multiplied for w in mtp_weights(shape, depth))
    return Operations(mtp=products + attention_core(shape, length, causal) + head_operations(shape).total)


_FIELDS = {
    Part.ATTENTION: "attention_projections",
    Part.DENSE: "dense",
    Part.ROUTER: "router",
    Part.ROUTED: "routed_experts",
    Part.SHARED: "shared_experts",
    Part.HEAD: "head",
}


def _products(weights: Iterable[Weight]) -> Operations:
    """Operations a token of the matrix products with `weights`."""
    sums = dict.fromkeys(_FIELDS.values(), 0.0)
    for weight in weights:
        if weight.multiplied:
            sums[_FIELDS[weight.part]] += 2.0 * weight.multiplied
    return Operations(**sums)


def forward_operations(shape: ModelShape, length: int, causal: bool = True, mtp: bool = False) -> Operations:
    """Operations a token of one forward pass over rows of `length` tokens; `mtp` adds the modules."""
    total = head_operations(shape)
    for layer in range(shape.num_hidden_layers):
        total += layer_operations(shape, layer, length, causal)
    for depth in range(shape.num_nextn_predict_layers if mtp else 0):
        total += mtp_operations(shape, depth, length, causal)
    return total


def training_operations(shape: ModelShape, length: int, causal: bool = True, mtp: bool = False) -> Operations:
    """Operations a token of training: three forward passes. 250.5e9 at the report's shape and 4,096 tokens,
    281.2e9 if attention is counted as not causal (ISCA'25 table 2; the step of table 4 counts both ways)."""
    return forward_operations(shape, length, causal, mtp).times(3.0)


def cache_values(shape: ModelShape | GroupedQueryShape) -> int:
    """Values cached a token, all layers: with MLA the latent and the shared rotary key (report §2.1.1)."""
    if isinstance(shape, GroupedQueryShape):
        return shape.layers * 2 * shape.kv_heads * shape.head_dim
    return shape.num_hidden_layers * (shape.kv_lora_rank + shape.qk_rope_head_dim)


def cache_bytes(shape: ModelShape | GroupedQueryShape, dtype: str = "bf16") -> float:
    """Bytes cached a token: 70,272 at the report's shape in BF16 (ISCA'25 table 1).

    Raises:
        KeyError: `dtype` is none of `VALUE_BYTES`.
    """
    return cache_values(shape) * VALUE_BYTES[dtype]
