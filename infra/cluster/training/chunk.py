"""How long a micro-batch takes in each stage of a pipeline, predicted from a machine's description alone.

Computation runs on the SMs that all-to-all leaves it, also when nothing is exchanged: in the published
profile every GEMM is launched on 112 of 132. Alone, a forward or backward pass does its all-to-alls between
its operators, exposed. In an overlapped pair the all-to-alls of each hide behind the computation of the
other: the pair takes as long as the longer of the two, and the last combine, which has nothing left to hide
behind (report §3.2.1).
"""

from __future__ import annotations

from infra.cluster.machines import Machine
from infra.cluster.network.all_to_all import AllToAll, all_to_all, value_bytes
from infra.cluster.network.collectives import Group, all_gather
from infra.cluster.network.gate_reach import gate_reach
from infra.cluster.pipeline.times import Duration, StageTimes
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import Layout
from infra.cluster.training.operators import Counter, Work, seconds
from infra.cluster.training.stages import stage_layers


def stage_works(shape: ModelShape, layout: Layout, counter: Counter) -> tuple[tuple[Work, int, int], ...]:
    """The operators of each stage, its layers, MTP modules among them, and how many of them have experts."""
    dense, moe = counter.block(False), counter.block(True)
    first = shape.first_k_dense_replace
    works = []
    for stage, layers in enumerate(stage_layers(shape, layout)):
        found = counter.embedding() if stage == 0 else Work()
        count, exchanges = len(layers), sum(layer >= first for layer in layers)
        for layer in layers:
            found += moe if layer >= first else dense
        if stage == layout.stages - 1:
            found += counter.head()
            for depth in range(shape.num_nextn_predict_layers):
                sparse = shape.num_hidden_layers + depth >= first
                found += counter.mtp(sparse)
                count, exchanges = count + 1, exchanges + sparse
        works.append((found, count, exchanges))
    return tuple(works)


def layer_exchange(shape: ModelShape, layout: Layout, machine: Machine) -> AllToAll | None:
    """Dispatch and combine of one MoE layer and micro-batch; None where every GPU holds all experts."""
    if layout.expert == 1:
        return None
    dispatch, combine = value_bytes(layout.precision)
    where = gate_reach(shape, layout.expert, machine.gpus_per_node)
    return all_to_all(shape, layout.micro_tokens, layout.expert, machine, dispatch, combine, where=where)


def stage_times(shape: ModelShape, layout: Layout, machine: Machine, imbalance: float = 1.0) -> StageTimes:
    """Durations of F, I, W and of every pair, by stage, of the layout's micro-batches.

    `imbalance` is how many rows the busiest GPU's experts have over the mean.
    """
    counter = Counter(
        shape, layout.micro_tokens, layout.length, layout.precision, layout.recompute, imbalance
    )
    precision, there, back, last = layout.precision, 0.0, 0.0, 0.0
    sms = machine.multiprocessors
    exchange = layer_exchange(shape, layout, machine)
    if exchange:
        there, back = exchange.forward_seconds, exchange.backward_seconds
        if "full" in layout.recompute:
            # A layer that is made again sends its tokens to their experts again.
            back += exchange.forward_seconds
        last = exchange.combine.seconds
        sms -= machine.communication_sms
    works, layers, exchanges = zip(*stage_works(shape, layout, counter), strict=True)
    # Nothing hides what the GPUs of one sequence tell each other: their layers wait for it.
    shared = [count * _sharing(shape, layout, machine) for count in layers]

    def alone(part: str, exchanged: float, waits: bool) -> tuple[Duration, ...]:
        found = []
        for work, count, waited in zip(works, exchanges, shared, strict=True):
            exposed = count * exchanged + (waited if waits else 0.0)
            found.append(Duration(seconds(getattr(work, part), machine, precision, sms) + exposed, exposed))
        return tuple(found)

    forward = [seconds(work.forward, machine, precision, sms) for work in works]
    backward = [seconds(work.inputs + work.weights, machine, precision, sms) for work in works]
    pairs = {}
    for first, computed in enumerate(forward):
        for second, gradients in enumerate(backward):
            busy = computed + gradients
            exchanged = exchanges[first] * there + exchanges[second] * back
            exposed = max(0.0, exchanged - busy) + (last if exchanged else 0.0)
            exposed += shared[first] + shared[second]
            pairs[first, second] = Duration(busy + exposed, exposed)
    return StageTimes(
        alone("forward", there, True),
        alone("inputs", back, True),
        alone("weights", 0.0, False),
        pairs=pairs,
    )


def _sharing(shape: ModelShape, layout: Layout, machine: Machine) -> float:
    """Seconds a layer and pass in which the `tensor` GPUs of one sequence gather it and share out results:
    around attention, and around the networks that all tokens go through (report §3.4.1, TP with SP)."""
    if layout.tensor == 1:
        return 0.0
    in_node = min(layout.tensor, machine.gpus_per_node)
    value = 4 if layout.precision == "fp32" else 2
    moved = layout.micro_tokens * layout.tensor * shape.hidden_size * value
    return 4 * all_gather(moved, Group(layout.tensor // in_node, in_node), machine).seconds
