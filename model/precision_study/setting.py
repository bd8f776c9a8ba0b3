"""What is trained in the comparison: a model, its batches and its schedule, in one size for each machine."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class Setting:
    """One size of the comparison. Every run of it sees `steps` batches of `rows` rows of `length` bytes."""

    name: str
    config: ModelConfig
    rows: int
    length: int
    steps: int
    warmup: int
    lr: float
    held_out_rows: int
    text_bytes: int
    """How much text is read: training rows and held-out rows together."""


SMALL = Setting(
    name="small",
    config=ModelConfig(
        vocab_size=256,
        hidden_size=256,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_nextn_predict_layers=1,
        initializer_range=0.02,
        original_max_position_embeddings=128,
    ),
    rows=8,
    length=128,
    steps=240,
    warmup=20,
    lr=2e-3,
    held_out_rows=256,
    text_bytes=4_000_000,
)
"""Minutes a run on one CPU core. Most sums are over one or two tiles of 128: long sums are not in it."""

MEDIUM = Setting(
    name="medium",
    config=ModelConfig(
        vocab_size=256,
        hidden_size=768,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        intermediate_size=2048,
        moe_intermediate_size=256,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_attention_heads=8,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_nextn_predict_layers=1,
        initializer_range=0.02,
        original_max_position_embeddings=512,
    ),
    rows=32,
    length=512,
    steps=1000,
    warmup=50,
    lr=6e-4,
    held_out_rows=256,
    text_bytes=24_000_000,
)
"""100M parameters, for a GPU."""

SETTINGS = {setting.name: setting for setting in (SMALL, MEDIUM)}
