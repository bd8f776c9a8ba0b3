"""Kernels of a step: their operations against the accounting, their bounds against published kernels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from infra.cluster.counts.accounting import forward_operations, head_operations, parameters
from infra.cluster.counts.weights import Part
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.kernels import Kernel
from infra.cluster.serving.memory import weight_bytes
from infra.cluster.serving.roofline import Roofline, decode_step, draft_step, prefill_step
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.serving.h800 import H800
from tests.infra.cluster.serving.units import (
    DECODE_PRODUCTION,
    DECODE_REPORT,
    PREFILL_PRODUCTION,
    PREFILL_REPORT,
)

V3 = ModelConfig()
GPU = H800
ONE = Deployment("one GPU", gpus=1, tensor_parallel=1, slots_per_gpu=256)


def operations(step: Roofline) -> float:
    return sum(one.layers * one.operations for one in step.kernels)


def find(step: Roofline, name: str) -> Kernel:
    (found,) = (one for one in step.kernels if one.name == name)
    return found


def test_decode_does_the_operations_of_a_token() -> None:
    """Absorbing W_UK and W_UV moves their products, it does not change how many there are."""
    step = decode_step(V3, GPU, ONE, requests=5, context=1000)
    core = find(step, "attention over the cache")
    products = forward_operations(V3, 1000)
    assert operations(step) - 61 * core.operations == pytest.approx(
        5 * (products.total - products.attention_core)
    )
    # Scores over 576 values and sums over 512, for 128 heads and 1000 cached tokens.
    assert core.operations == 5 * 2 * 128 * 1000 * (576 + 512)


def test_prefill_does_the_operations_of_a_prompt() -> None:
    step = prefill_step(V3, H800, ONE, tokens=3000, prompt=3000)
    without_head = forward_operations(V3, 3000).total - head_operations(V3).total
    assert operations(step) == pytest.approx(3000 * without_head + head_operations(V3).total)


@pytest.mark.parametrize("unit", [DECODE_REPORT, DECODE_PRODUCTION, PREFILL_REPORT])
def test_a_unit_does_the_operations_of_all_its_tokens(unit: Deployment) -> None:
    """The GPUs of a unit together do what one does, except that all of a group project down their own."""
    whole = decode_step(V3, GPU, ONE, requests=8, context=500)
    part = decode_step(V3, GPU, unit, requests=8, context=500)
    assert operations(part) == pytest.approx(operations(whole))


@pytest.mark.parametrize("unit", [DECODE_REPORT, DECODE_PRODUCTION, PREFILL_REPORT])
def test_a_full_step_reads_every_weight_once(unit: Deployment) -> None:
    """With next to no rows, what moves is weights: the same bytes as memory holds, less those unread."""
    step = decode_step(V3, GPU, unit, requests=1e-9, context=1)
    moved = sum(one.layers * one.bytes for one in step.kernels if one.name != "routed experts")
    routed = parameters(V3).parts[Part.ROUTED].total / 256 * unit.slots_per_gpu
    embedding = 2 * parameters(V3).parts[Part.EMBEDDING].total / unit.tensor_parallel
    # Norms are not in the kernels: fifteen thousand values a layer.
    assert moved + routed + embedding == pytest.approx(weight_bytes(V3, unit), rel=1e-3)


def test_experts_read_are_those_hit() -> None:
    """Against routing drawn at random with the group limit, over one GPU that holds all experts."""
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 30):
        hit = []
        for _ in range(200):
            scores = rng.random((tokens, 8, 32))
            best = np.sort(scores, axis=2)[:, :, -2:].sum(2)
            allowed = best >= np.sort(best, axis=1)[:, -4][:, None]
            kept = np.where(allowed[:, :, None], scores, -1.0).reshape(tokens, 256)
            hit.append(len(np.unique(np.argsort(kept, axis=1)[:, -8:])))
        assert ONE.slots_read(V3, tokens) == pytest.approx(np.mean(hit), rel=0.03)
    assert ONE.slots_read(V3, 1) == pytest.approx(8)


def test_attention_binds_as_flashmla_says() -> None:
    """128 heads for one query are about at the ridge, two queries are past it; with 16 heads memory binds."""
    one = find(decode_step(V3, GPU, ONE, 64, 4096), "attention over the cache")
    two = find(decode_step(V3, GPU, ONE, 64, 4096, queries=2), "attention over the cache")
    assert one.intensity == pytest.approx(one.ridge, rel=0.05)
    assert two.bound == "products"
    # FlashMLA reaches 580 to 660 TFLOPS where products bind, on this card.
    assert 580e12 < two.operations / two.seconds < 660e12
    few = replace(ONE, gpus=8, tensor_parallel=8, slots_per_gpu=32)
    assert find(decode_step(V3, GPU, few, 64, 4096), "attention over the cache").bound == "memory"


def test_batches_move_from_memory_to_products() -> None:
    """A product with one row is a vector's: two operations a byte in FP8. Many rows reach the peak."""
    steps = [decode_step(V3, GPU, DECODE_PRODUCTION, batch, 64) for batch in (1, 16, 128, 1024)]
    shares = [step.share("products") for step in steps]
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] > 0.75
    assert find(steps[0], "W_O").intensity == pytest.approx(2.0, rel=0.01)
    rates = [step.tokens_per_second for step in steps]
    assert rates == sorted(rates)
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(steps))


def test_parts_add_up() -> None:
    step = decode_step(V3, GPU, DECODE_REPORT, 32, 4096)
    attention, dense, experts, head = (step.layer(p) for p in ("attention", "dense", "experts", "head"))
    assert step.seconds == pytest.approx(61 * attention + 3 * dense + 58 * experts + head)
    assert step.share("memory") + step.share("products") == pytest.approx(1.0)


def test_a_group_repeats_the_cache() -> None:
    """Four GPUs share the heads of four times the requests: each reads the whole cache of all of them."""
    group = find(decode_step(V3, GPU, replace(ONE, gpus=4, tensor_parallel=4), 16, 8192), "W_O")
    alone = find(decode_step(V3, GPU, ONE, 16, 8192), "W_O")
    assert group.operations == alone.operations
    assert group.bytes < alone.bytes
    cache = "attention over the cache"
    grouped = find(decode_step(V3, GPU, replace(ONE, gpus=4, tensor_parallel=4), 16, 8192), cache)
    assert grouped.bytes > 3.5 * find(decode_step(V3, GPU, ONE, 16, 8192), cache).bytes


def test_what_is_cached_is_not_computed() -> None:
    full = prefill_step(V3, H800, PREFILL_PRODUCTION, 4096, prompt=4096)
    half = prefill_step(V3, H800, PREFILL_PRODUCTION, 4096, prompt=8192, cached=4096)
    core = "causal attention"
    assert find(half, core).operations == pytest.approx(3 * find(full, core).operations, rel=1e-3)
    assert find(half, "W_O").operations == find(full, "W_O").operations


def test_a_draft_is_a_layer_a_projection_and_the_head() -> None:
    draft = draft_step(V3, GPU, ONE, requests=3, context=100)
    core = find(draft, "attention over the cache").operations
    counted = parameters(V3).mtp.active + parameters(V3).parts[Part.HEAD].total
    # Less than a ten-thousandth are norms, which no product has.
    assert operations(draft) - core == pytest.approx(2 * 3 * counted, rel=1e-4)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="requests is 0"):
        decode_step(V3, GPU, ONE, 0, 100)
    with pytest.raises(ConfigError, match="slots_per_gpu is 1: 8 GPUs have 8 slots for 256 experts; 32"):
        decode_step(V3, GPU, Deployment("small", 8, 1, 1), 1, 100)
    with pytest.raises(ConfigError, match="cached is 100"):
        prefill_step(V3, H800, ONE, 100, prompt=100, cached=100)
    with pytest.raises(ConfigError, match=r"^odd: deployment.tensor_parallel is 3, .* the 8 GPUs; 2 does"):
        decode_step(V3, GPU, Deployment("odd", 8, 3, 32), 1, 100)
    with pytest.raises(ConfigError, match="does not divide the 128 heads; 1 does"):
        decode_step(V3, GPU, Deployment("odd", 9, 3, 32), 1, 100)


def test_the_units_of_the_report() -> None:
    assert PREFILL_REPORT.slots == 288
    assert DECODE_REPORT.slots == 320
    assert DECODE_REPORT.copies(V3) == 9
    assert PREFILL_PRODUCTION.copies(V3) == 8
    assert DECODE_PRODUCTION.slots == 256 + 32


def test_a_draft_takes_the_head_once_a_request() -> None:
    """Its first run takes in two verified tokens a request and drafts from the last."""
    one, two = (draft_step(V3, GPU, ONE, requests=3, context=100, queries=n) for n in (1, 2))
    assert find(one, "output head") == find(two, "output head")
    assert find(two, "MTP projection").operations == 2 * find(one, "MTP projection").operations


def test_a_gpu_without_fp8_serves_in_bf16() -> None:
    """Twice the bytes of the linear layers, by the BF16 peak."""
    old = replace(H800, fp8=0)
    for make in (
        lambda machine: decode_step(V3, machine, DECODE_PRODUCTION, 256, 4096),
        lambda machine: prefill_step(V3, machine, PREFILL_PRODUCTION, 8192, 4096),
        lambda machine: draft_step(V3, machine, DECODE_PRODUCTION, 8, 4096),
    ):
        low, high = make(H800), make(old)
        assert operations(low) == operations(high)
        assert high.seconds > 1.1 * low.seconds
    full = find(prefill_step(V3, old, PREFILL_PRODUCTION, 8192, 4096), "W_O")
    assert full.operations / full.seconds == pytest.approx(989.5e12 * 0.75 * 112 / 132)
    low, high = (decode_step(V3, machine, DECODE_PRODUCTION, 1, 64) for machine in (H800, old))
    twice = 2 * find(low, "routed experts").bytes
    assert find(high, "routed experts").bytes == pytest.approx(twice, rel=0.01)
    assert weight_bytes(V3, PREFILL_PRODUCTION, 2.0) > 1.8 * weight_bytes(V3, PREFILL_PRODUCTION)


def test_prefill_lends_multiprocessors_to_communication() -> None:
    lent = find(prefill_step(V3, H800, PREFILL_PRODUCTION, 8192, 4096), "W_O")
    all_own = replace(H800, communication_sms=0)
    kept = find(prefill_step(V3, all_own, PREFILL_PRODUCTION, 8192, 4096), "W_O")
    assert lent.bound == "products"
    assert kept.seconds == pytest.approx(lent.seconds * 112 / 132)
