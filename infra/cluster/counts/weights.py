"""Every weight of a model, by name and shape, from its sizes alone: what all counting here sums over.

Names and shapes are those that `model.transformer.Transformer` gives its parameters and routing biases, so
the list can be compared with a model that exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from infra.cluster.shape import ModelShape


class Part(StrEnum):
    """What a weight belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    NORMS = "norms"
    DENSE = "dense"
    ROUTER = "router"
    BIASES = "routing_biases"
    ROUTED = "routed_experts"
    SHARED = "shared_experts"
    JOIN = "mtp_join"
    """The matrix that an MTP module joins the state and the next embedding with."""
    HEAD = "head"


LINEAR = frozenset({Part.ATTENTION, Part.DENSE, Part.ROUTED, Part.SHARED, Part.JOIN})
"""Linear layers inside blocks: what runs in FP8 under that precision (report §3.3.1)."""


@dataclass(frozen=True)
class Weight:
    """One weight: [out, in], [experts, out, in] or a vector."""

    name: str
    part: Part
    shape: tuple[int, ...]
    used: int = 1
    """How many of the routed experts a token goes to; 1 for everything else."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def active(self) -> int:
        """Elements that one token meets: its own experts, its own row of the embedding."""
        if self.part is Part.EMBEDDING:
            return self.shape[1]
        if self.part is Part.ROUTED:
            return self.used * math.prod(self.shape[1:])
        return self.elements

    @property
    def multiplied(self) -> int:
        """Elements that one token is multiplied with in matrix products: a multiply-add each."""
        return 0 if len(self.shape) == 1 or self.part is Part.EMBEDDING else self.active

    @property
    def trained(self) -> bool:
        """Whether it has a gradient: routing biases have none."""
        return self.part is not Part.BIASES


def layer_weights(shape: ModelShape, layer: int, prefix: str | None = None) -> tuple[Weight, ...]:
    """One transformer layer (0-based; an MTP module's layer follows the main ones), named under `prefix`."""
    s, name = shape, f"layers.{layer}." if prefix is None else prefix
    hidden, heads = s.hidden_size, s.num_attention_heads
    attention, mlp = f"{name}self_attn.", f"{name}mlp."
    query_out = heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
    latent_out = heads * (s.qk_nope_head_dim + s.v_head_dim)
    return (
        Weight(f"{name}input_layernorm.weight", Part.NORMS, (hidden,)),
        Weight(f"{attention}q_a_proj", Part.ATTENTION, (s.q_lora_rank, hidden)),
        Weight(f"{attention}q_a_layernorm.weight", Part.NORMS, (s.q_lora_rank,)),
        Weight(f"{attention}q_b_proj", Part.ATTENTION, (query_out, s.q_lora_rank)),
        Weight(f"{attention}kv_a_proj", Part.ATTENTION, (s.kv_lora_rank + s.qk_rope_head_dim, hidden)),
        Weight(f"{attention}kv_a_layernorm.weight", Part.NORMS, (s.kv_lora_rank,)),
        Weight(f"{attention}kv_b_proj", Part.ATTENTION, (latent_out, s.kv_lora_rank)),
        Weight(f"{attention}o_proj", Part.ATTENTION, (hidden, heads * s.v_head_dim)),
        Weight(f"{name}post_attention_layernorm.weight", Part.NORMS, (hidden,)),
        *(_dense(s, mlp) if layer < s.first_k_dense_replace else _experts(s, mlp)),
    )


def _dense(shape: ModelShape, name: str) -> tuple[Weight, ...]:
    return _network(name, Part.DENSE, shape.hidden_size, shape.intermediate_size)


def _experts(shape: ModelShape, name: str) -> tuple[Weight, ...]:
    s = shape
    experts, hidden, width, used = (
        s.n_routed_experts,
        s.hidden_size,
        s.moe_intermediate_size,
        s.num_experts_per_tok,
    )
    shared = _network(f"{name}shared_experts.", Part.SHARED, hidden, s.n_shared_experts * width)
    return (
        Weight(f"{name}gate.weight", Part.ROUTER, (experts, hidden)),
        Weight(f"{name}gate.e_score_correction_bias", Part.BIASES, (experts,)),
        Weight(f"{name}experts.gate_up_proj", Part.ROUTED, (experts, 2 * width, hidden), used),
        Weight(f"{name}experts.down_proj", Part.ROUTED, (experts, hidden, width), used),
        *(shared if s.n_shared_experts else ()),
    )


def _network(name: str, part: Part, hidden: int, width: int) -> tuple[Weight, ...]:
    """A SwiGLU network; gate and up projection are one matrix."""
    return (
        Weight(f"{name}gate_up_proj", part, (2 * width, hidden)),
        Weight(f"{name}down_proj", part, (hidden, width)),
    )


def embedding_weights(shape: ModelShape) -> tuple[Weight, ...]:
    return (Weight("embed_tokens", Part.EMBEDDING, (shape.vocab_size, shape.hidden_size)),)


def head_weights(shape: ModelShape) -> tuple[Weight, ...]:
    """The final norm and the output head, which is not tied to the embedding."""
    return (
        Weight("norm.weight", Part.NORMS, (shape.hidden_size,)),
        Weight("lm_head", Part.HEAD, (shape.vocab_size, shape.hidden_size)),
    )


def mtp_weights(shape: ModelShape, depth: int) -> tuple[Weight, ...]:
    """What an MTP module (0-based) adds; embedding and head are the main model's (report §2.2)."""
    name, hidden = f"mtp.{depth}.", shape.hidden_size
    return (
        Weight(f"{name}enorm.weight", Part.NORMS, (hidden,)),
        Weight(f"{name}hnorm.weight", Part.NORMS, (hidden,)),
        Weight(f"{name}eh_proj", Part.JOIN, (hidden, 2 * hidden)),
        *layer_weights(shape, shape.num_hidden_layers + depth, f"{name}block."),
        Weight(f"{name}norm.weight", Part.NORMS, (hidden,)),
    )


def main_weights(shape: ModelShape) -> tuple[Weight, ...]:
    """The model without its MTP modules."""
    layers = (w for layer in range(shape.num_hidden_layers) for w in layer_weights(shape, layer))
    return (*embedding_weights(shape), *layers, *head_weights(shape))


def all_mtp_weights(shape: ModelShape) -> tuple[Weight, ...]:
    return tuple(w for depth in range(shape.num_nextn_predict_layers) for w in mtp_weights(shape, depth))
