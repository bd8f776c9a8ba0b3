"""What the benchmarks share: the model that is timed, its peers, and how they are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernels.figures import Row
from model.config import ModelConfig

ROWS, LENGTH = 8, 512
CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=6,
    first_k_dense_replace=1,
    intermediate_size=512,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=48,
    num_nextn_predict_layers=0,
    original_max_position_embeddings=LENGTH,
)
"""About 40 MFLOP a token."""

Peer = tuple[str, dict[str, Any]]
FP32: Peer = ("transformers fp32", {"dtype": torch.float32})
BEST: Peer = (
    "transformers bf16, grouped_mm, eager",
    {"dtype": torch.bfloat16, "experts_implementation": "grouped_mm", "attn_implementation": "eager"},
)


def peer(folder: Path, settings: dict[str, Any]) -> Any:
    """transformers' model of the folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def median_seconds(call: Callable[[], object], least: float = 0.02) -> float:
    """Median seconds of a call, over at least five and about `least` seconds of them."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, one after the other in every round; one round before is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratio(name: str, unit: str, ours: float, other: float, peer_name: str, goal: float) -> Row:
    """A row that compares with a peer and must reach `goal` times it."""
    return Row(name, unit, ours, other, peer_name, ours / other, goal, holds=ours / other >= goal)
