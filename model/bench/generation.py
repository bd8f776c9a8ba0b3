"""The generation half: batches beside transformers, the invariant mode, drafts, long contexts."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kernels.figures import Row, at_least, at_most
from model.bench.setting import BEST, CONFIG, FP32, in_turns, median_seconds, peer, ratio
from model.bench.training import products
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.sampling import Sampling
from model.hf import write_weights
from model.loss import next_token_losses
from model.optim.build import Optimizer, OptimizerConfig
from model.transformer import Transformer, build

PROMPT, NEW = 64, 64


def generation(rounds: int) -> list[Row]:
    """All rows of this file."""
    return [*batches(rounds), *drafts(rounds), *long_contexts()]


def batches(rounds: int) -> list[Row]:
    """Greedy generation of 64 tokens after 64, for 32 prompts at once and for one alone."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for precision, (name, settings) in (("fp32", FP32), ("bf16", BEST)):
        with tempfile.TemporaryDirectory() as folder:
            write_weights(build(CONFIG, 0), Path(folder), 0, 1)
            theirs = peer(Path(folder), settings).eval()
        model = build(CONFIG, 0, precision)
        for count, goal in ((32, 10.0), (1, 2.0)):
            prompts = torch.randint(CONFIG.vocab_size, (count, PROMPT), generator=generator)
            calls: dict[str, Callable[[], object]] = {
                "ours": runner(model, prompts.tolist()),
                "invariant": runner(model, prompts.tolist(), invariant=True),
                "transformers": partial(
                    theirs.generate,
                    prompts,
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    attention_mask=torch.ones_like(prompts),
                ),
            }
            taken = in_turns(calls, rounds)
            made = count * NEW
            label = f"generation {precision}, batch {count}"
            rows.append(
                ratio(label, "token/s", made / taken["ours"], made / taken["transformers"], name, goal)
            )
            least = prompt_limit(model, count) + decode_limit(model, count) * NEW
            rows.append(Row(f"{label}, its products alone", "token/s", made / least))
            rows.append(Row(f"{label}, share of that limit", "", least / taken["ours"]))
            rows.append(Row(f"{label}, invariant: cost over plain", "x", taken["invariant"] / taken["ours"]))
    return rows


def runner(model: Transformer, prompts: list[list[int]], **options: object) -> Callable[[], object]:
    """Generates `NEW` greedy tokens after each prompt with one engine, which never reuses a prompt."""
    engine = Engine(model, [], context=PROMPT + NEW, **options)  # type: ignore[arg-type]
    requests = [Request(tuple(prompt), Sampling(NEW, temperature=0.0)) for prompt in prompts]

    def call() -> object:
        engine.forget()
        return engine.generate(requests)

    return call


def prompt_limit(model: Transformer, rows: int) -> float:
    """Seconds that the products of reading the prompts take by themselves."""
    total = 0.0
    for count, m, k, n in products(model.config, rows * PROMPT):
        x, w = (torch.randn(shape).to(model.precision.activation_dtype) for shape in ((max(m, 1), k), (k, n)))
        total += count * median_seconds(partial(torch.mm, x, w))
    return total


def decode_limit(model: Transformer, rows: int) -> float:
    """Seconds that the products of one decoding step take by themselves, each at its shape and type."""
    c, dtype = model.config, model.precision.activation_dtype
    heads, d, width = c.num_attention_heads, c.hidden_size, c.moe_intermediate_size
    moe = c.num_hidden_layers - c.first_k_dense_replace
    touched = min(c.n_routed_experts, rows * c.num_experts_per_tok)
    each = max(1, rows * c.num_experts_per_tok // touched)
    shapes = [
        (c.num_hidden_layers, 1, rows, d, c.q_lora_rank + c.latent_dim),
        (c.num_hidden_layers, 1, rows, c.q_lora_rank, heads * c.qk_head_dim),
        (c.num_hidden_layers, heads, rows, c.qk_nope_head_dim, c.kv_lora_rank),
        (c.num_hidden_layers, rows, heads, c.latent_dim, PROMPT + NEW // 2),
        (c.num_hidden_layers, rows, heads, PROMPT + NEW // 2, c.kv_lora_rank),
        (c.num_hidden_layers, heads, rows, c.kv_lora_rank, c.v_head_dim),
        (c.num_hidden_layers, 1, rows, heads * c.v_head_dim, d),
        (c.first_k_dense_replace, 1, rows, d, 2 * c.intermediate_size),
        (c.first_k_dense_replace, 1, rows, c.intermediate_size, d),
        (moe, 1, rows, d, c.n_routed_experts),
        (moe, touched, each, d, 2 * width),
        (moe, touched, each, width, d),
        (moe, 1, rows, d, 2 * width * c.n_shared_experts),
        (moe, 1, rows, width * c.n_shared_experts, d),
        (1, 1, rows, d, c.vocab_size),
    ]
    total = 0.0
    for count, batch, m, k, n in shapes:
        # A weight of each layer: the next step does not find them in the nearest cache.
        x = torch.randn(batch, m, k).to(dtype)
        weights = [torch.randn(batch, k, n).to(dtype) for _ in range(max(1, count))]

        def once(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
            for w in weights:
                torch.mm(x[0], w[0]) if len(x) == 1 else torch.bmm(x, w)

        total += median_seconds(once) if count else 0.0
    return total


def drafts(rounds: int) -> list[Row]:
    """One request with and without drafts, on a model that has learned a simple language."""
    model = build(replace(CONFIG, num_nextn_predict_layers=1, initializer_range=0.02), 0)
    _teach(model)
    prompts = [[1, 5, 9]]
    plain, drafting = runner(model, prompts), {n: runner(model, prompts, drafts=n) for n in (1, 2, 3)}
    taken = in_turns({"plain": plain, **{str(n): call for n, call in drafting.items()}}, rounds)
    rows, found = [], {}
    for n in drafting:
        engine = Engine(model, [], context=PROMPT + NEW, drafts=n)
        engine.generate([Request(tuple(prompts[0]), Sampling(NEW, temperature=0.0))])
        label = f"speculation, batch 1, {n} drafts"
        rows.append(Row(f"{label}: accepted", "", engine.figures.acceptance))
        rows.append(Row(f"{label}: speed over plain", "x", taken["plain"] / taken[str(n)]))
        # Drafts that are hardly accepted show nothing about their speed.
        found[n] = taken["plain"] / taken[str(n)] if engine.figures.acceptance >= 0.8 else 0.0
    best = max(found, key=lambda n: found[n])
    rows.append(
        at_least(f"speculation, batch 1, the best ({best}), accepted 0.8 or more", "x", found[best], 1.3)
    )
    return rows


def _teach(model: Transformer, steps: int = 60, alphabet: int = 64) -> None:
    """A language in which a token has a likely successor and a rare one."""
    generator = torch.Generator().manual_seed(0)
    optimizer = Optimizer(model, OptimizerConfig(lr=3e-3))
    model.train()
    for _ in range(steps):
        rows_BT = torch.randint(alphabet, (16, 1), generator=generator)
        for _ in range(63):
            last = rows_BT[:, -1:]
            rare = torch.rand(last.shape, generator=generator) < 0.1
            rows_BT = torch.cat((rows_BT, torch.where(rare, last * 3 + 2, last * 5 + 1) % alphabet), 1)
        losses = next_token_losses(
            model, model(rows_BT, mtp=True), rows_BT, torch.ones_like(rows_BT, dtype=torch.bool)
        )
        ((losses.main + losses.mtp[0]) / rows_BT.numel()).backward()
        optimizer.step(1.0)
    model.eval()


def long_contexts(lengths: tuple[int, ...] = (1024, 4096, 16384), steps: int = 24) -> list[Row]:
    """Seconds of a decoding step at growing context, and how fast the added cache was read."""
    model = build(CONFIG, 0)
    generator = torch.Generator().manual_seed(0)
    rows, taken = [], {}
    for length in lengths:
        engine = Engine(model, [], context=length + 2 * steps, max_rows=1)
        prompt = torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist()
        engine.submit(Request(tuple(prompt), Sampling(2 * steps, temperature=0.0)))
        while not engine.figures.made_tokens:
            engine.step()
        times = []
        while len(times) < steps:
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        taken[length] = statistics.median(times)
        rows.append(Row(f"decoding step at context {length}", "ms", 1e3 * taken[length]))
    added = (lengths[-1] - lengths[0]) * CONFIG.latent_dim * 4 * CONFIG.num_hidden_layers
    speed = added / (taken[lengths[-1]] - taken[lengths[0]])
    # As many bytes, read once by two products of one row each.
    cache = [
        torch.randn(lengths[-1] - lengths[0], CONFIG.latent_dim) for _ in range(CONFIG.num_hidden_layers)
    ]
    query = torch.randn(CONFIG.num_attention_heads, CONFIG.latent_dim)
    once = median_seconds(lambda: [torch.mm(query, latents.t()) @ latents for latents in cache])
    rows.append(Row("added cache read", "GB/s", speed / 1e9))
    name = "added decoding time over that of reading the added cache"
    rows.append(at_most(name, "x", (taken[lengths[-1]] - taken[lengths[0]]) / once, 1.5))
    return rows
