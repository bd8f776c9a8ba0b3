"""Chapters: what decoding is bound by, units that serve, where experts go, drafts, and a model at home."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from infra.cluster import published
from infra.cluster.counts.shapes import DEEPSEEK_V2
from infra.cluster.machines import Machine
from infra.cluster.network.even_split import even_split
from infra.cluster.plan import Request
from infra.cluster.report.chapter import Cell, Chapter, Table, beside, figure
from infra.cluster.serving.decode_limit import PAPER_HIDDEN, DecodeLimit, decode_limit
from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.disaggregation import Traffic, disaggregate
from infra.cluster.serving.hardware import AI_SOC, AI_SOC_WIDE, TWO_SOCKETS
from infra.cluster.serving.local import local, local_dense
from infra.cluster.serving.overlap import overlap_decode
from infra.cluster.serving.placement import place
from infra.cluster.serving.roofline import decode_step
from infra.cluster.serving.speculation import speculate
from infra.cluster.shape import ModelShape
from infra.errors import ConfigError
from kernels.figures import Row

CONTEXT = 4096
"""Tokens that a request has in its cache, in the tables that do not say otherwise."""
BATCHES = (1, 8, 32, 128, 256)
DRAFTED = (1, 4, 16, 64, 256)
ACCEPTANCES = (0.7, 0.8, *published.DRAFT_ACCEPTANCE)
SHORT = 3e-6
"""Seconds below which a kernel takes less than its launch does, in a graph too."""
FIELDS = {"gpus": "gpus", "tensor_parallel": "tensor", "slots_per_gpu": "slots"}
"""A deployment's fields as a preset names them."""


def serving_chapter(asked: Request) -> list[Chapter]:
    """The chapters of a model that is served: none where no unit is asked for.

    A unit that cannot be is said in its chapters; the others stay.
    """
    shape, machine, prefill, decode = asked.shape, asked.machine, asked.prefill, asked.decode
    chapters = [_limit(shape)] if asked.published_model else []
    if decode:
        chapters += [
            _told("Decoding, roofline", lambda title: _decoding(title, shape, machine, decode)),
            _told("Speculative decoding", lambda title: _drafts(title, shape, machine, decode)),
        ]
    if prefill and decode:
        chapters.append(
            _told(
                "Prefill and decode apart",
                lambda title: _units(title, shape, machine, prefill, decode, asked.traffic),
            )
        )
    if prefill or asked.published_model:
        chapters.append(_placement(shape, machine, prefill, asked.published_model))
    if asked.published_model:
        chapters.append(_home(shape))
    return chapters


def _told(title: str, make: Callable[[str], Chapter]) -> Chapter:
    """The chapter, or one that says why it cannot be."""
    try:
        return make(title)
    except ConfigError as error:
        return Chapter(title, notes=(_by_preset(error),))


def _by_preset(error: ConfigError) -> str:
    """What is wrong with a unit, by the field of the preset."""

    def field(found: re.Match[str]) -> str:
        return f"cluster.{found[1]}.{FIELDS.get(found[2], found[2])}"

    return re.sub(r"^(prefill|decode)\b[^:]*: deployment\.(\w+)", field, str(error))


def _limit(shape: ModelShape) -> Chapter:
    """The paper's limit of decoding with expert parallelism (ISCA'25 §2.3.2), and what it rounds."""
    rows: list[Row] = []
    for each in published.DECODE:
        paper = decode_limit(shape, each.bandwidth, hidden=PAPER_HIDDEN)
        for what, unit, ours, theirs, within in (
            ("all-to-all", "us", 1e6 * paper.communication, each.microseconds, 1e-3),
            ("TPOT", "ms", 1e3 * paper.tpot, each.tpot, 1e-3),
            ("decoding", "tokens/s", paper.tokens_per_second, each.speed, 2e-2),
        ):
            rows.append(beside(f"{each.name}: {what}", unit, ours, theirs, within, must=True))
        rows += _exact(each.name, decode_limit(shape, each.bandwidth))
    notes = (
        "The paper writes the hidden size as 7K; its figures are those of 7,000. The rows of 7,168 are the "
        "model's own. Both count one byte a value sent in FP8, as the paper does: its scales add 1/32, and "
        "are in the next chapter, as latency and computation are.",
    )
    return Chapter("Decoding, limit of the all-to-all", tuple(rows), (), notes)


def _exact(name: str, limit: DecodeLimit) -> list[Row]:
    return [
        figure(f"{name}, hidden {limit.hidden:,}: all-to-all", "us", 1e6 * limit.communication),
        figure(f"{name}, hidden {limit.hidden:,}: TPOT", "ms", 1e3 * limit.tpot),
        figure(f"{name}, hidden {limit.hidden:,}: decoding", "tokens/s", limit.tokens_per_second),
    ]


def _decoding(title: str, shape: ModelShape, machine: Machine, unit: Deployment) -> Chapter:
    """Roofline of one decode step, and two micro-batches that hide each other's all-to-all."""
    step = decode_step(shape, machine, unit, 32, CONTEXT)
    roofline = Table(
        f"Kernels of a step of 32 requests a GPU, {CONTEXT:,} tokens each, {unit.name}",
        ("kernel", "FLOP a byte", "ridge", "bound by", "layers", "us a layer"),
        tuple(
            (each.name, each.intensity, each.ridge, each.bound, each.layers, 1e6 * each.seconds)
            for each in step.kernels
        ),
    )
    lines: list[tuple[Cell, ...]] = []
    for batch in BATCHES:
        alone = decode_step(shape, machine, unit, batch, CONTEXT)
        if unit.gpus > 1:
            overlap = overlap_decode(shape, machine, unit, batch, CONTEXT)
            lines.append(
                (
                    batch,
                    1e3 * alone.seconds,
                    f"{100 * alone.share('memory'):.0f}%",
                    1e3 * overlap.communication,
                    1e3 * overlap.alone,
                    1e3 * overlap.overlapped,
                    overlap.bound,
                    1 / overlap.best,
                )
            )
        else:
            share = f"{100 * alone.share('memory'):.0f}%"
            lines.append((batch, 1e3 * alone.seconds, share, None, None, None, "", 1 / alone.seconds))
    overlapped = Table(
        f"Steps by requests a GPU, {CONTEXT:,} tokens each",
        (
            "requests",
            "computing, ms",
            "memory-bound",
            "all-to-all, ms",
            "one after the other, ms",
            "two micro-batches, ms",
            "bound by",
            "tokens/s a request",
        ),
        tuple(lines),
    )
    notes = [
        "Bounds: a kernel takes the longer of its products and its bytes; launches, element-wise kernels "
        "and the host are not in it. A request's tokens a second are those of the faster of one batch and "
        "two micro-batches."
    ]
    if not machine.fp8:
        notes.append(
            f"{machine.name} has no FP8: weights are read and tokens sent in BF16, at its BF16 peak."
        )
    short = sum(each.layers for each in step.kernels if each.seconds < SHORT)
    count = sum(each.layers for each in step.kernels)
    if 2 * short > count:
        notes.append(
            f"{short:,} of the {count:,} kernels of this step last less than {1e6 * SHORT:g} us, about what "
            "a launch takes even in a graph: the model is too small for these bounds to be near its speed."
        )
    return Chapter(title, (), (roofline, overlapped), tuple(notes))


def _drafts(title: str, shape: ModelShape, machine: Machine, unit: Deployment) -> Chapter:
    """What one draft of the MTP module brings, by acceptance and batch."""
    if not shape.num_nextn_predict_layers:
        return Chapter(title, notes=("The model has no MTP module to draft with.",))

    def faster(batch: int, acceptance: float) -> float:
        return speculate(shape, machine, unit, batch, CONTEXT, acceptance, communication=True).speedup

    lines = tuple(
        (f"{100 * acceptance:.0f}%", *(faster(batch, acceptance) for batch in DRAFTED))
        for acceptance in ACCEPTANCES
    )
    table = Table(
        "Speed over decoding without drafts, one draft, by requests a GPU",
        ("accepted", *(str(batch) for batch in DRAFTED)),
        lines,
    )
    low, high = published.DRAFT_ACCEPTANCE
    notes = (
        f"Published: {published.DRAFT_SPEED.value:g} times at {100 * low:.0f} to {100 * high:.0f}% "
        "(report §5.4.3). Steps have their all-to-alls in them, hidden where two micro-batches are faster; "
        "those of the draft itself are never hidden.",
        *(_waits(shape, machine, unit, batch) for batch in (DRAFTED[0], DRAFTED[-1])),
    )
    return Chapter(title, (), (table,), notes)


def _waits(shape: ModelShape, machine: Machine, unit: Deployment, batch: int) -> str:
    """What a step that verifies one draft a request takes, and what it waits for."""
    plain = overlap_decode(shape, machine, unit, batch, CONTEXT)
    step = overlap_decode(shape, machine, unit, batch, CONTEXT, queries=2)
    share = decode_step(shape, machine, unit, batch, CONTEXT, queries=2).share("products")
    bound = "products" if share > 0.5 else "memory"
    return (
        f"At {batch:,} request{'s' if batch > 1 else ''} a GPU a step that verifies a draft takes "
        f"{step.best / plain.best:.2f} times as long as one without: in two micro-batches "
        f"{1e3 * step.communication:.3g} ms of all-to-all beside {1e3 * step.computation:.3g} ms of "
        f"computation, {100 * max(share, 1 - share):.0f}% of it bound by {bound}."
    )


def _units(
    title: str,
    shape: ModelShape,
    machine: Machine,
    prefill: Deployment,
    decode: Deployment,
    traffic: Traffic,
) -> Chapter:
    """How many prefill and decode units some traffic takes (report §3.4, ISCA'25 §2.3.1)."""
    found = disaggregate(shape, machine, prefill, decode, traffic)
    rows = (
        figure("prefill units", "units", found.prefill_units),
        figure("decode units", "units", found.decode_units),
        figure("GPUs", "GPUs", found.gpus),
        figure("time to the first token", "s", found.ttft),
        figure("time per output token", "ms", 1e3 * found.decode.tpot),
        figure("prompt tokens a second and prefill GPU", "tokens/s", found.prefill.input_per_gpu),
        figure("output tokens a second and decode GPU", "tokens/s", found.decode.output_per_gpu),
        figure("requests at once on a decode GPU", "requests", found.decode.requests),
        figure("cache handed over a request", "MB", found.transfer_bytes / 1e6),
        figure("time to hand it over", "ms", 1e3 * found.transfer_seconds),
    )
    told = (
        f"Traffic of {traffic.requests_per_second:g} requests a second, {traffic.prompt:,} tokens in and "
        f"{traffic.output:,} out; units of {prefill.gpus} and {decode.gpus} GPUs; TPOT at most 50 ms. "
        "Units are sized to be 80% busy, prefill works in steps of 16,384 tokens a GPU; time and requests of "
        "decoding are those of a full unit.",
    )
    return Chapter(title, rows, (), told)


def _placement(shape: ModelShape, machine: Machine, unit: Deployment | None, is_v3: bool) -> Chapter:
    """Redundant experts, balanced in nodes or over all GPUs."""
    rows: list[Row] = []
    if is_v3:
        # The worked example of EPLB's readme: loads of two layers, and the placement that it prints.
        load = np.array(published.EPLB_LOAD, dtype=float)
        placed = place(load, 16, groups=4, nodes=2, gpus=8)
        ours = placed.gpu_load(load).max(axis=1)
        slots = _slot_loads(load, np.array(published.EPLB_SLOTS))
        theirs = slots.reshape(2, 8, 2).sum(axis=2).max(axis=1)
        for layer in range(2):
            name = f"EPLB's example, layer {layer + 1}: load of the fullest GPU"
            rows.append(beside(name, "tokens", float(ours[layer]), float(theirs[layer])))
    tables: tuple[Table, ...] = ()
    notes = (
        "Loads of the table are drawn: log-normal, a different one for every expert. Hierarchical keeps the "
        "experts of a group in one node, so that a token still reaches as few nodes as its gate allows.",
    )
    if unit and unit.gpus > 1:
        try:
            unit.check(shape)
            tables = (_balance(shape, machine, unit),)
        except ConfigError as error:
            notes = (_by_preset(error),)
    return Chapter("Where experts go", tuple(rows), tables, notes)


def _slot_loads(load: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """[layers, slots]: each expert's load shared by its copies."""
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in slots])
    layers = np.arange(len(load))[:, None]
    return load[layers, slots] / counts[layers, slots]


def _balance(shape: ModelShape, machine: Machine, unit: Deployment) -> Table:
    """What is left of two spreads of load after balancing."""
    nodes, _ = even_split(unit.gpus, machine.gpus_per_node)
    lines: list[tuple[Cell, ...]] = []
    for spread in (0.4, 1.0):
        load = _drawn(shape.n_routed_experts, spread)
        for name, groups, count in (("hierarchical", shape.n_group, nodes), ("global", 1, 1)):
            placed = place(load, unit.slots, groups=groups, nodes=count, gpus=unit.gpus)
            lines.append((f"{spread:g}", name, float(placed.imbalance(load).mean())))
    head = ("spread of loads", "balancing", "fullest GPU over the mean")
    return Table(f"{unit.slots} slots on {unit.gpus} GPUs", head, tuple(lines))


@lru_cache(maxsize=8)
def _drawn(experts: int, spread: float) -> np.ndarray:
    return np.random.default_rng(0).lognormal(0.0, spread, (8, experts))


def _home(shape: ModelShape) -> Chapter:
    """A model whose weights lie in the memory of one computer (ISCA'25 §2.2.2)."""
    lines = []
    for name, found, told in (
        ("DeepSeek-V2 on an AI SoC", local(DEEPSEEK_V2, AI_SOC), published.HOME_V2),
        ("DeepSeek-V2, bus twice as wide", local(DEEPSEEK_V2, AI_SOC_WIDE), published.HOME_V2),
        ("a dense 70B model on an AI SoC", local_dense(70e9, AI_SOC), published.HOME_DENSE),
        ("this model, two sockets and a GPU", local(shape, TWO_SOCKETS), published.HOME_V3),
    ):
        lines.append(
            (
                name,
                found.host.name,
                found.host_bytes / 1e9,
                found.gpu_bytes / 1e9,
                found.tokens_per_second,
                told,
            )
        )
    head = ("model", "host", "GB a token, host", "GB a token, GPU", "tokens/s at most", "published")
    notes = (
        "Upper bounds: activated bytes a token over memory bandwidth, four-bit weights, routed experts in "
        "the host's memory and the rest on the GPU if there is one.",
    )
    return Chapter("At home", (), (Table("", head, tuple(lines)),), notes)
