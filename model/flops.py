"""Arithmetic of a model: parameters, the work of a token, and a machine's published peak.

Counts follow from the configuration alone, so they hold for models that fit no machine here. A multiply-add
is two operations; training does a forward pass and twice that going back (report §4.1; checked against its
250 GFLOP a token, ISCA'25 table 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig

# Dense BF16 and FP8 operations a second as published, without sparsity.
_PEAKS = {
    "H100 PCIe": (756e12, 1513e12),
    "H100": (989.5e12, 1979e12),
    "H800": (989.5e12, 1979e12),
    "H200": (989.5e12, 1979e12),
    "A100": (312e12, 0.0),
}


@dataclass(frozen=True)
class Size:
    """Elements of the main model's weights; the MTP modules are counted apart."""

    total: int
    """All weights, routing biases (which are buffers) not included."""
    active: int
    """Weights that one token multiplies with: all but the idle experts and the embedding table."""
    mtp: int
    """Weights that the MTP modules add to the main model, which shares its embedding and head with them."""


def sizes(config: ModelConfig) -> Size:
    """Parameter counts by arithmetic: 671,026,404,352 and 36.6B at the report's shape."""
    c = config
    heads, d = c.num_attention_heads, c.hidden_size
    attention = (
        c.q_lora_rank * (d + 1)
        + heads * c.qk_head_dim * c.q_lora_rank
        + (c.kv_lora_rank + c.qk_rope_head_dim) * d
        + c.kv_lora_rank
        + heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
        + d * heads * c.v_head_dim
    )
    expert = 3 * d * c.moe_intermediate_size
    dense = attention + 2 * d + 3 * d * c.intermediate_size
    fixed = attention + 2 * d + c.n_routed_experts * d + c.n_shared_experts * expert
    sparse, used = fixed + c.n_routed_experts * expert, fixed + c.num_experts_per_tok * expert
    first = c.first_k_dense_replace
    table = c.vocab_size * d
    layers = first * dense + (c.num_hidden_layers - first) * sparse
    worked = first * dense + (c.num_hidden_layers - first) * used
    module = (sparse if c.is_moe(c.num_hidden_layers) else dense) + 2 * d * d + 3 * d
    return Size(2 * table + layers + d, table + worked + d, c.num_nextn_predict_layers * module)


def attention_flops(config: ModelConfig, length: int) -> float:
    """Operations a token of causal attention itself, forward, averaged over a row of `length` tokens."""
    c = config
    widths = c.qk_head_dim + c.v_head_dim
    return c.num_hidden_layers * 2.0 * c.num_attention_heads * widths * (length + 1) / 2


def training_flops(config: ModelConfig, length: int, mtp: bool = False) -> float:
    """Operations a token of training on rows of `length` tokens: 250.5e9 at the report's shape and 4,096.

    `mtp` adds the prediction modules, each of which also goes through the shared head.
    """
    c, size = config, sizes(config)
    once = 2.0 * size.active + attention_flops(c, length)
    if mtp:
        idle = (
            max(0, c.n_routed_experts - c.num_experts_per_tok) * 3 * c.hidden_size * c.moe_intermediate_size
        )
        worked = size.mtp - (c.num_nextn_predict_layers * idle if c.is_moe(c.num_hidden_layers) else 0)
        head = c.num_nextn_predict_layers * c.vocab_size * c.hidden_size
        once += 2.0 * (worked + head)
        once += attention_flops(c, length) * c.num_nextn_predict_layers / c.num_hidden_layers
    return 3.0 * once


def peak_flops(device: torch.device, precision: str) -> float:
    """Published peak in operations a second of a known GPU for a precision policy, 0.0 where none is
    known."""
    if device.type != "cuda" or precision == "fp32":
        return 0.0
    name = torch.cuda.get_device_name(device)
    for known, (bf16, fp8) in _PEAKS.items():
        if known in name:
            return fp8 if precision == "fp8" else bf16
    return 0.0
