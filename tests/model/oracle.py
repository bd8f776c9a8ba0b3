"""transformers' DeepseekV3ForCausalLM with the weights of one of our models.

Configuration and names are written out here a second time, so that `model/hf.py` can be contradicted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer


def oracle(model: Transformer) -> torch.nn.Module:
    """The twin of a model's main part, in training mode."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    twin = DeepseekV3ForCausalLM(DeepseekV3Config(**_arguments(model.config)))
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    theirs = dict(twin.named_parameters()) | dict(twin.named_buffers())
    left = {name for name in theirs if "inv_freq" not in name}
    with torch.no_grad():
        for name, value in own.items():
            if name.startswith("mtp."):
                continue
            parts = counterparts(name)
            for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
                assert theirs[part].shape == piece.shape, (part, theirs[part].shape, piece.shape)
                theirs[part].copy_(piece)
                left.discard(part)
    assert not left, left
    return twin.train()


def counterparts(name: str) -> list[str]:
    """Names there of what is one tensor here: gate and up projections of dense networks are two."""
    if name in ("embed_tokens", "norm.weight"):
        return [f"model.{name}".removesuffix(".weight") + ".weight"]
    if name == "lm_head":
        return ["lm_head.weight"]
    name = f"model.{name}".replace(".kv_a_proj", ".kv_a_proj_with_mqa")
    if name.endswith((".weight", ".e_score_correction_bias")) or ".mlp.experts." in name:
        return [name]
    if name.endswith(".gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return [f"{stem}gate_proj.weight", f"{stem}up_proj.weight"]
    return [f"{name}.weight"]


def gradient(twin: torch.nn.Module, name: str) -> Tensor:
    """Gradient of the twin's counterpart of one of our parameters."""
    parameters = dict(twin.named_parameters())
    return torch.cat([parameters[part].grad for part in counterparts(name)])


def _arguments(c: ModelConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": c.rope_factor,
            "original_max_position_embeddings": c.original_max_position_embeddings,
            "beta_fast": c.beta_fast,
            "beta_slow": c.beta_slow,
            "mscale": c.mscale,
            "mscale_all_dim": c.mscale,
        }
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_attention_heads,
        "n_shared_experts": c.n_shared_experts,
        "n_routed_experts": c.n_routed_experts,
        "routed_scaling_factor": c.routed_scaling_factor,
        "kv_lora_rank": c.kv_lora_rank,
        "q_lora_rank": c.q_lora_rank,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "v_head_dim": c.v_head_dim,
        "n_group": c.n_group,
        "topk_group": c.topk_group,
        "num_experts_per_tok": c.num_experts_per_tok,
        "first_k_dense_replace": c.first_k_dense_replace,
        "norm_topk_prob": True,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": rope,
        "rope_interleave": True,
        "attn_implementation": "eager",
    }
