"""Chapter: what the model counts to."""

from __future__ import annotations

from infra.cluster import published
from infra.cluster.counts.accounting import (
    cache_bytes,
    forward_operations,
    parameters,
    training_operations,
)
from infra.cluster.counts.shapes import DEEPSEEK_V2, LLAMA_405B, QWEN_72B, uncompressed
from infra.cluster.counts.weights import Part
from infra.cluster.report.chapter import Chapter, Table, beside, figure
from infra.cluster.shape import ModelShape
from kernels.figures import Row

GIGA = 1e9


def model_chapter(shape: ModelShape, length: int, is_v3: bool) -> Chapter:
    """Parameters, operations a token at rows of `length`, cache bytes; beside the report's where `is_v3`."""
    count = parameters(shape)
    causal = training_operations(shape, length).total
    square = training_operations(shape, length, causal=False).total
    forward = forward_operations(shape, length)
    cache = cache_bytes(shape)
    qwen, llama = cache_bytes(QWEN_72B), cache_bytes(LLAMA_405B)
    v2 = training_operations(DEEPSEEK_V2, 4096).total
    rows: list[Row] = []
    if is_v3:
        rows += [
            _same("checkpoint without MTP", "elements", count.checkpoint, published.CHECKPOINT),
            _same("of them routing biases", "elements", count.parts[Part.BIASES].total, published.BIASES),
            beside(
                "activated without the embedding",
                "parameters",
                count.active,
                published.ACTIVE.value,
                0.5 / 37,
                must=True,
            ),
            beside(
                "training, causal attention",
                "GFLOP a token",
                causal / GIGA,
                published.FLOPS_V3.value / GIGA,
                4e-3,
                must=True,
            ),
            figure("training, whole square of attention", "GFLOP a token", square / GIGA),
            beside(
                "DeepSeek-V2 by the same formula",
                "GFLOP a token",
                v2 / GIGA,
                published.FLOPS_V2.value / GIGA,
                6e-3,
                must=True,
            ),
            _same("KV cache, BF16", "bytes a token", cache, published.KV_V3),
            _same("KV cache of Qwen2.5-72B", "bytes a token", qwen, published.KV_QWEN),
            _same("KV cache of LLaMA-3.1-405B", "bytes a token", llama, published.KV_LLAMA),
            beside(
                "KV cache of Qwen2.5-72B over it",
                "times",
                qwen / cache,
                published.KV_QWEN_TIMES.value,
                2e-3,
                must=True,
            ),
            beside(
                "KV cache of LLaMA-3.1-405B over it", "times", llama / cache, published.KV_LLAMA_TIMES.value
            ),
        ]
    else:
        rows += [
            figure("checkpoint without MTP", "elements", count.checkpoint),
            figure("activated without the embedding", "parameters", count.active),
            figure("training, causal attention", "GFLOP a token", causal / GIGA),
            figure("training, whole square of attention", "GFLOP a token", square / GIGA),
            figure("KV cache, BF16", "bytes a token", cache),
            figure("KV cache of Qwen2.5-72B over it", "times", qwen / cache),
        ]
    rows += [
        figure(
            "activated with the embedding row's table and the head", "parameters", count.active_with_embedding
        ),
        figure("activated in blocks alone", "parameters", count.active_without_head),
        figure("MTP modules, what they add", "parameters", count.mtp.total),
    ]
    parts = Table(
        "Parameters by component",
        ("component", "total", "activated", "share of total"),
        tuple(
            (str(part).replace("_", " "), each.total, each.active, f"{100 * each.total / count.total:.2f}%")
            for part, each in count.parts.items()
            if each.total
        ),
    )
    names = (
        "attention_core",
        "attention_projections",
        "dense",
        "router",
        "routed_experts",
        "shared_experts",
        "head",
    )
    work = Table(
        f"Operations of a token, forward, rows of {length:,} tokens",
        ("component", "GFLOP", "share"),
        tuple(
            (
                name.replace("_", " "),
                getattr(forward, name) / GIGA,
                f"{100 * getattr(forward, name) / forward.total:.1f}%",
            )
            for name in names
        ),
    )
    mha = cache_bytes(uncompressed(shape))
    caches = Table(
        "KV cache, bytes a token in BF16",
        ("model", "bytes", "times this model's"),
        (
            ("this model, MLA", cache, 1.0),
            ("the same heads uncompressed (MHA)", mha, mha / cache),
            ("Qwen2.5-72B, GQA", qwen, qwen / cache),
            ("LLaMA-3.1-405B, GQA", llama, llama / cache),
        ),
    )
    notes = ()
    if is_v3:
        notes = (
            "The paper prints 7.28x for LLaMA-3.1-405B; its own bytes, which are equal to ours, give 7.34x.",
        )
    return Chapter("Model", tuple(rows), (parts, work, caches), notes)


def _same(name: str, unit: str, ours: float, theirs: published.Published) -> Row:
    """A count that must be the published one."""
    return beside(name, unit, ours, theirs.value, 0.0, must=True)
