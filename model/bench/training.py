"""The training half: a step beside transformers and beside the machine's limit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.cluster.counts.accounting import training_operations
from kernels.figures import Row, at_least, at_most
from model.allocations import allocations
from model.bench.setting import BEST, CONFIG, FP32, LENGTH, ROWS, in_turns, median_seconds, peer, ratio
from model.config import ModelConfig
from model.heap import keep_freed_memory
from model.hf import write_weights
from model.lanes import Lanes
from model.optim.build import Optimizer, OptimizerConfig
from model.train import LoopConfig, Step, step_gradients
from model.transformer import Transformer, build


def products(config: ModelConfig, tokens: int) -> list[tuple[int, int, int, int]]:
    """(how often, M, K, N) of every matrix product of a forward pass over `tokens` tokens, attention's own
    apart."""
    c = config
    d, heads = c.hidden_size, c.num_attention_heads
    layers, moe = c.num_hidden_layers, c.num_hidden_layers - c.first_k_dense_replace
    expert, each = c.moe_intermediate_size, tokens * c.num_experts_per_tok // c.n_routed_experts
    found = [
        (layers, tokens, d, c.q_lora_rank),
        (layers, tokens, c.q_lora_rank, heads * c.qk_head_dim),
        (layers, tokens, d, c.kv_lora_rank + c.qk_rope_head_dim),
        (layers, tokens, c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)),
        (layers, tokens, heads * c.v_head_dim, d),
        (c.first_k_dense_replace, tokens, d, 2 * c.intermediate_size),
        (c.first_k_dense_replace, tokens, c.intermediate_size, d),
        (moe, tokens, d, c.n_routed_experts),
        (moe * c.n_routed_experts, each, d, 2 * expert),
        (moe * c.n_routed_experts, each, expert, d),
        (moe, tokens, d, 2 * expert * c.n_shared_experts),
        (moe, tokens, expert * c.n_shared_experts, d),
        (1, tokens, d, c.vocab_size),
    ]
    return [product for product in found if product[0]]


def limit_seconds(config: ModelConfig, rows: int, length: int, dtype: torch.dtype) -> float:
    """Seconds that the products of one training step take by themselves: each shape, forward and both ways
    back."""
    total = 0.0
    for count, m, k, n in products(config, rows * length):
        x, w, y = (torch.randn(shape).to(dtype) for shape in ((m, k), (n, k), (m, n)))
        for left, right in ((x, w.t()), (y, w), (y.t(), x)):
            total += count * median_seconds(partial(torch.mm, left, right))
    heads = rows * config.num_attention_heads
    q, v = (torch.randn(heads, length, width).to(dtype) for width in (config.qk_head_dim, config.v_head_dim))
    p = torch.randn(heads, length, length).to(dtype)
    # Causal: half of each square product counts. Back go two products for each one forward.
    once = (median_seconds(lambda: q @ q.transpose(1, 2)) + median_seconds(lambda: p @ v)) / 2
    return total + 3 * once * config.num_hidden_layers


def our_step(model: Transformer, batch: dict[str, Tensor], lanes: int) -> Callable[[], float]:
    """One step of pretraining as `model.train` does it, on the same rows every time."""
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-4))
    config = LoopConfig(micro_rows=ROWS // lanes)
    threads = Lanes(model, lanes)
    keep_freed_memory()
    model.train()

    def step() -> float:
        # As inside `with threads`, which can be entered only once: the peers get all threads back, and the
        # same allocator.
        torch.set_num_threads(1)
        figures, _ = step_gradients(threads, batch, Step(ROWS, 1.0), config)
        optimizer.step(1.0)
        torch.set_num_threads(lanes)
        return figures["loss"]

    return step


def peer_step(model: Any, tokens_BT: Tensor) -> Callable[[], float]:
    """The same step in transformers: its own loss, AdamW, clipped gradients."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()

    def step() -> float:
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def training(rounds: int, threads: int) -> list[Row]:
    """Speed and memory of a training step, fp32 and bf16."""
    tokens_BT = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens_BT,
        "segments": torch.zeros_like(tokens_BT),
        "loss": torch.ones_like(tokens_BT, dtype=torch.uint8),
    }
    steps: dict[str, Callable[[], float]] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            steps[f"ours {precision}"] = our_step(build(CONFIG, 0, precision), batch, threads)
        write_weights(build(CONFIG, 0), Path(folder), 0, 1)
        for name, settings in (FP32, BEST):
            steps[name] = peer_step(peer(Path(folder), settings), tokens_BT)
    taken = in_turns(steps, rounds)
    count = ROWS * LENGTH
    work = training_operations(CONFIG, LENGTH).total * count
    for precision, dtype, (name, _), goal in (
        ("fp32", torch.float32, FP32, 1.4),
        ("bf16", torch.bfloat16, BEST, 2.0),
    ):
        ours, other = taken[f"ours {precision}"], taken[name]
        limit = limit_seconds(CONFIG, ROWS, LENGTH, dtype)
        label = f"training step {precision}"
        rows.append(Row(f"{label}, its products alone", "GFLOP/s", work / limit / 1e9))
        if precision == "fp32":
            rows.append(at_least(f"{label}, share of that limit", "", limit / ours, 0.75))
        else:
            rows.append(Row(f"{label}, share of that limit", "", limit / ours))
        rows.append(ratio(label, "token/s", count / ours, count / other, name, goal))
        peak, peer_peak = _peak(steps[f"ours {precision}"]), _peak(steps[name])
        rows.append(
            at_most(f"{label}, peak memory over transformers'", "", peak / peer_peak, 0.6)
            if precision == "fp32"
            else Row(f"{label}, peak memory over transformers'", "", peak / peer_peak)
        )
    return rows


def _peak(step: Callable[[], float]) -> int:
    """Most bytes that a step takes at once beyond what lives from step to step (gradients are made anew by
    each)."""
    return allocations(step)[2]
