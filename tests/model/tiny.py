"""Small models for tests: every size is different, so that two of them swapped cannot go unseen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer, build

TINY = ModelConfig(
    vocab_size=71,
    hidden_size=36,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=52,
    moe_intermediate_size=20,
    n_routed_experts=12,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    num_attention_heads=3,
    q_lora_rank=28,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=14,
    original_max_position_embeddings=32,
    # Large enough that attention and routing differ clearly between tokens.
    initializer_range=0.2,
)


def tiny(seed: int = 0, precision: str = "fp32", bias: float = 0.2, **changes: Any) -> Transformer:
    """A model with random weights, random norms and random routing biases of the given spread."""
    model = build(replace(TINY, **changes), seed, precision)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for gate in model.gates():
            gate.e_score_correction_bias.copy_(
                bias * torch.randn(gate.e_score_correction_bias.shape, generator=generator)
            )
    return model


def tokens(rows: int, length: int, seed: int = 0, vocab_size: int = TINY.vocab_size) -> Tensor:
    """Random token ids, int64 [rows, length]."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
