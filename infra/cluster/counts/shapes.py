"""Shapes of published models that DeepSeek-V3 is compared with, from their `config.json` files.

`Sizes` holds a model with MLA and experts, `GroupedQueryShape` what a model of another attention caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.shape import ModelShape


@dataclass(frozen=True)
class Sizes:
    """A `ModelShape` that is nothing but its sizes."""

    name: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_nextn_predict_layers: int


@dataclass(frozen=True)
class GroupedQueryShape:
    """What a model with grouped-query attention caches: a key and a value for each of its KV heads."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int


def uncompressed(shape: ModelShape) -> GroupedQueryShape:
    """Multi-head attention with as many heads as `shape`, of the width of its values, and no latent."""
    return GroupedQueryShape(
        "MHA of the same shape", shape.num_hidden_layers, shape.num_attention_heads, shape.v_head_dim
    )


DEEPSEEK_V2 = Sizes(
    name="DeepSeek-V2",
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_nextn_predict_layers=0,
)
"""Its router has no biases, which are DeepSeek-V3's own: leave `checkpoint` elements aside here."""

QWEN_72B = GroupedQueryShape("Qwen2.5-72B", layers=80, kv_heads=8, head_dim=128)
LLAMA_405B = GroupedQueryShape("LLaMA-3.1-405B", layers=126, kv_heads=8, head_dim=128)

DEEPSEEK_V3 = Sizes(
    name="DeepSeek-V3",
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_nextn_predict_layers=1,
)
