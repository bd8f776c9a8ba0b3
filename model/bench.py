"""Time training and generation beside transformers' DeepseekV3 with the same weights, and beside the
machine's limit.

    python -m model.bench [--json FILE] [--only train|generate]

The limit of a training step is the time that its matrix products alone take: each is timed at its own shape,
type and number of threads, forward and both ways back. Peers run in turns with ours, so that all meet the
same machine; times are medians. Memory is what the step's tensors take beyond weights, gradients and
optimizer state.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.figures import Row, at_least, at_most, show, write
from model.allocations import allocations
from model.config import ModelConfig
from model.engine.engine import Engine, Request
from model.engine.sampling import Sampling
from model.flops import training_flops
from model.hf import write_weights
from model.lanes import Lanes
from model.optim.build import Optimizer, OptimizerConfig
from model.train import LoopConfig, Step, step_gradients
from model.transformer import Transformer, build

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
            total += count * _median(partial(torch.mm, left, right))
    heads = rows * config.num_attention_heads
    q, v = (torch.randn(heads, length, width).to(dtype) for width in (config.qk_head_dim, config.v_head_dim))
    p = torch.randn(heads, length, length).to(dtype)
    # Causal: half of each square product counts. Back go two products for each one forward.
    once = (_median(lambda: q @ q.transpose(1, 2)) + _median(lambda: p @ v)) / 2
    return total + 3 * once * config.num_hidden_layers


def _median(call: Callable[[], object], least: float = 0.02) -> float:
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


def our_step(model: Transformer, batch: dict[str, Tensor], lanes: int) -> Callable[[], float]:
    """One step of pretraining as `model.train` does it, on the same rows every time."""
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-4))
    config = LoopConfig(micro_rows=ROWS // lanes)
    threads = Lanes(model, lanes)
    model.train()

    def step() -> float:
        # As inside `with threads`, which can be entered only once: the peers get all threads back.
        torch.set_num_threads(1)
        figures, _ = step_gradients(threads, batch, Step(ROWS, 1.0), config)
        torch.set_num_threads(lanes)
        optimizer.step(1.0)
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


def peer(folder: Path, settings: dict[str, Any]) -> Any:
    """transformers' model of the folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


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
    work = training_flops(CONFIG, LENGTH) * count
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
        rows.append(_ratio(label, "token/s", count / ours, count / other, name, goal))
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


def generation(rounds: int) -> list[Row]:
    """Speed of greedy generation of 64 tokens, 32 prompts at once and one alone."""
    generator = torch.Generator().manual_seed(0)
    model = build(CONFIG, 0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_weights(model, Path(folder), 0, 1)
        theirs = peer(Path(folder), FP32[1]).eval()
    for count, goal in ((32, 10.0), (1, 2.0)):
        prompts = torch.randint(CONFIG.vocab_size, (count, 64), generator=generator)
        requests = [Request(tuple(prompt)) for prompt in prompts.tolist()]
        engine, sampling = Engine(model, []), Sampling(max_tokens=64, temperature=0.0)
        calls = {
            "ours": lambda e=engine, r=requests, s=sampling: e.generate(r, s),
            "transformers": lambda p=prompts: theirs.generate(
                p, max_new_tokens=64, min_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(p)
            ),
        }
        taken = in_turns(calls, rounds)
        made = count * 64
        label = f"generation, batch {count}"
        rows.append(
            _ratio(label, "token/s", made / taken["ours"], made / taken["transformers"], "transformers", goal)
        )
    return rows


def _ratio(name: str, unit: str, ours: float, other: float, peer_name: str, goal: float) -> Row:
    return Row(name, unit, ours, other, peer_name, ours / other, goal, holds=ours / other >= goal)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--only", choices=("train", "generate"), help="one part alone")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    if given.only != "generate":
        rows += training(given.rounds, torch.get_num_threads())
    if given.only != "train":
        rows += generation(given.rounds)
    print(show(rows))
    if given.json:
        write(given.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
