"""Bytes that a layout takes on a GPU of each pipeline rank, by what they are for.

Weights that products read are whole on every GPU (but under ZeRO 3), in the format of the precision policy;
under `fp8` both sides of each block, made once a step (`kernels/layers/weight.py`). FP32 master weights and
the optimizer's moments are shared out among all GPUs that hold the same weight: for an expert the replicas of
its expert group, else the data-parallel ranks, and under DualPipe those of both ranks that a stage lies on.

What no schedule changes is counted from the layout; how many micro-batches are alive on a rank at its fullest
moment is an argument, since only the schedule, replayed, can say it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from infra.cluster.counts.weights import LINEAR, Part, Weight
from infra.cluster.shape import ModelShape
from infra.cluster.training.activations import head_kept, layer_kept, mtp_kept, tiles, value_bytes
from infra.cluster.training.layout import Layout
from infra.cluster.training.stages import rank_weights, settled, stage_layers
from infra.errors import ConfigError

LOGIT_POSITIONS = 2048
"""Positions whose logits exist at one time in the loss (`kernels/fused/cross_entropy.py`)."""
RESERVED = 2 * 2**30
"""Allowance for what no tensor takes: the driver's context, communication libraries, fragments of the
allocator. An assumption, not a measurement."""


Live = float | Sequence[float]
"""Micro-batches whose activations a rank holds at its fullest moment, counted once for each stage that holds
them: those of each of its stages, in the order of `Layout.held`, or their sum."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU of a pipeline rank."""

    weights: float
    """As products read them."""
    gradients: float
    """FP32, added up over the micro-batches of a step."""
    master: float
    """FP32 weights that the optimizer writes, where products read others."""
    moments: float
    activations: float
    """What live micro-batches keep for their backward passes."""
    loss: float
    """A chunk of logits, and the head's gradient of each prediction, which the forward pass makes in FP32."""
    exchange: float
    """What all-to-all and pipeline transfers read and write."""
    working: float
    """Tensors inside a layer that is running."""
    reserved: float = RESERVED

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def by_component(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def memory(
    shape: ModelShape, layout: Layout, live: Sequence[Live], load: float = 1.0
) -> tuple[RankMemory, ...]:
    """Bytes on a GPU of each pipeline rank, in order.

    `live` is of each rank. Where it is the sum over a rank's stages, all are counted as of the larger stage.
    `load` is the rows that the busiest GPU's experts get over those of the mean GPU.

    Raises:
        ConfigError: `live` is not for this layout's ranks.
    """
    if len(live) != layout.pipeline:
        raise ConfigError(
            f"live has {len(live)} numbers, and layout.pipeline is {layout.pipeline}: give one a rank"
        )
    layout = settled(shape, layout)
    held = [rank_weights(shape, layout, rank) for rank in range(layout.pipeline)]
    holders: dict[str, int] = {}
    for weights in held:
        for weight in weights:
            holders[weight.name] = holders.get(weight.name, 0) + 1
    return tuple(
        _rank_memory(shape, layout, rank, held[rank], holders, live[rank], load)
        for rank in range(layout.pipeline)
    )


def _rank_memory(
    shape: ModelShape,
    layout: Layout,
    rank: int,
    weights: Sequence[Weight],
    holders: dict[str, int],
    live: Live,
    load: float,
) -> RankMemory:
    read = gradients = master = moments = 0.0
    for weight in weights:
        elements = local_elements(layout, weight)
        share = elements / (holders[weight.name] * replicas(layout, weight))
        read += read_bytes(layout, weight) * (share / elements if layout.zero >= 3 else 1)
        if not weight.trained:
            continue
        gradients += 4 * (share if layout.zero >= 2 else elements)
        owned = share if layout.zero >= 1 else elements
        moments += 2 * (2 if layout.moments == "bf16" else 4) * owned
        if _narrow(layout.precision, weight.part):
            master += 4 * owned
    stages = layout.held(rank)
    kept = [stage_kept(shape, layout, stage, load) for stage in stages]
    if isinstance(live, Sequence):
        alive = sum(count * size for count, size in zip(live, kept, strict=True))
    else:
        alive = live * max(kept)
    return RankMemory(
        weights=read,
        gradients=gradients,
        master=master,
        moments=moments,
        activations=layout.micro_tokens * alive,
        loss=loss_bytes(shape, layout) if layout.stages - 1 in stages else 0.0,
        exchange=exchange_bytes(shape, layout, load),
        working=working_bytes(shape, layout, load) + _gathered(layout, weights),
    )


def local_elements(layout: Layout, weight: Weight) -> float:
    """Elements of a weight on one GPU, before ZeRO: experts are spread over their group, linear layers,
    embedding and head over tensor-parallel GPUs."""
    if weight.part is Part.ROUTED:
        return weight.elements / layout.expert
    whole = weight.part in (Part.NORMS, Part.ROUTER, Part.BIASES)
    return weight.elements if whole else weight.elements / layout.tensor


def replicas(layout: Layout, weight: Weight) -> int:
    """GPUs of one pipeline rank that hold the same part of a weight."""
    if weight.part is Part.ROUTED:
        return layout.expert_replicas
    whole = weight.part in (Part.NORMS, Part.ROUTER, Part.BIASES)
    return layout.rank_gpus if whole else layout.data


def _narrow(precision: str, part: Part) -> bool:
    """Whether products read the weight in fewer bits than the optimizer writes."""
    return precision != "fp32" and part not in (Part.NORMS, Part.ROUTER, Part.BIASES)


def read_bytes(layout: Layout, weight: Weight) -> float:
    """Bytes of a weight on one GPU as products read it: FP8 codes and scales of both sides of a matrix in
    128x128 blocks, BF16 or FP32 values."""
    elements = local_elements(layout, weight)
    if not _narrow(layout.precision, weight.part):
        return 4 * elements
    if layout.precision == "fp8" and weight.part in LINEAR:
        rows, cols = weight.shape[-2:]
        blocks = math.ceil(rows / 128) * math.ceil(cols / 128) * (weight.elements / (rows * cols))
        return 2 * (elements + 4 * blocks * elements / weight.elements)
    return 2 * elements


def stage_kept(shape: ModelShape, layout: Layout, stage: int, load: float = 1.0) -> float:
    """Bytes a token that a stage keeps from its forward to its backward pass."""
    x = layout
    kept = [
        layer_kept(shape, layer, x.precision, x.recompute, load) for layer in stage_layers(shape, x)[stage]
    ]
    if stage == x.stages - 1:
        kept.append(head_kept(shape, x.precision))
        depths = range(shape.num_nextn_predict_layers)
        kept += [mtp_kept(shape, depth, x.precision, x.recompute, load) for depth in depths]
    return sum(sum(layer.values()) for layer in kept)


def loss_bytes(shape: ModelShape, layout: Layout) -> float:
    """Bytes of the loss on the last stage: one chunk of logits, and an FP32 gradient of the head for the main
    prediction and each MTP module's, which wait for the backward pass."""
    positions = min(LOGIT_POSITIONS, layout.micro_tokens)
    logits = positions * shape.vocab_size * value_bytes(layout.precision)
    gradient = 4 * shape.vocab_size * shape.hidden_size
    return (logits + gradient * (1 + shape.num_nextn_predict_layers)) / layout.tensor


def exchange_bytes(shape: ModelShape, layout: Layout, load: float = 1.0) -> float:
    """Bytes that transfers hold beside what layers keep: rows of tokens sent to experts, in FP8 under `fp8`,
    and their outputs, which come back in high precision (§3.3.3); a micro-batch of states each way between
    ranks. Twice that where a forward and a backward chunk run together."""
    hidden, wide = shape.hidden_size, value_bytes(layout.precision)
    row = 0.0
    if layout.expert > 1:
        sent = tiles(hidden) if layout.precision == "fp8" else wide * hidden
        row += load * shape.num_experts_per_tok * (sent + wide * hidden)
    if layout.pipeline > 1:
        row += 2 * wide * hidden
    return _chunks_at_once(layout) * layout.micro_tokens * row


def working_bytes(shape: ModelShape, layout: Layout, load: float = 1.0) -> float:
    """Bytes inside the largest layer while it runs: of its backward pass, and where a forward and a backward
    chunk run together, of a forward pass too. With `full` recomputation also all that a layer keeps."""
    parts = [attention_working(shape, layout)]
    if shape.first_k_dense_replace:
        parts.append(network_working(shape, layout, shape.intermediate_size, 1.0))
    if shape.first_k_dense_replace < shape.num_hidden_layers or shape.num_nextn_predict_layers:
        rows = load * shape.num_experts_per_tok
        parts.append(network_working(shape, layout, shape.moe_intermediate_size, rows))
    token = max(backward for _, backward in parts)
    if _chunks_at_once(layout) == 2:
        token += max(forward for forward, _ in parts)
    if "full" in layout.recompute:
        rest = layout.recompute - {"full"}
        layers = range(shape.num_hidden_layers)
        token += max(sum(layer_kept(shape, layer, layout.precision, rest, load).values()) for layer in layers)
    return layout.micro_tokens * token


def _chunks_at_once(layout: Layout) -> int:
    return 2 if layout.schedule in ("dualpipe", "dualpipev") else 1


def attention_working(shape: ModelShape, layout: Layout) -> tuple[float, float]:
    """Bytes a token of attention's (forward, backward) pass: queries before and after rotation, keys and
    values, the output; going back these and their gradients, of which that of the rotary key is FP32 and of
    each head until it is summed."""
    s, wide = shape, value_bytes(layout.precision)
    query = wide * s.num_attention_heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
    both = wide * s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim)
    value = wide * s.num_attention_heads * s.v_head_dim
    rotary = 4 * s.num_attention_heads * s.qk_rope_head_dim
    return 2 * query + both + value, 2 * (query + both + value) + rotary


def network_working(shape: ModelShape, layout: Layout, width: int, rows: float) -> tuple[float, float]:
    """Bytes a token of a SwiGLU network's (forward, backward) pass: inputs of SwiGLU, its output, the
    network's; going back the gradient that comes in, those of the hidden values and of both inputs of SwiGLU,
    and the one that goes out. Then the two factors of SwiGLU's product, where under `fp8` there are tiles
    along rows and along tokens of what products read."""
    wide, hidden = value_bytes(layout.precision), shape.hidden_size
    forward, backward = wide * (3 * width + hidden), wide * (2 * hidden + 3 * width)
    if layout.precision == "fp8":
        forward += tiles(width)
        backward += 3 * tiles(hidden) + 2 * tiles(2 * width)
    else:
        backward += wide * 2 * width
    return rows * forward, rows * backward


def _gathered(layout: Layout, weights: Sequence[Weight]) -> float:
    """What ZeRO 2 and 3 put together for the layer that runs: its gradients; its weights and the next's."""
    layers: dict[str, tuple[float, float]] = {}
    for weight in weights:
        layer = ".".join(weight.name.split(".")[:2])
        read, gradients = layers.get(layer, (0.0, 0.0))
        layers[layer] = (
            read + read_bytes(layout, weight),
            gradients + 4 * local_elements(layout, weight) * weight.trained,
        )
    size = 0.0
    if layout.zero >= 2:
        size += max(gradients for _, gradients in layers.values())
    if layout.zero >= 3:
        size += 2 * max(read for read, _ in layers.values())
    return size
