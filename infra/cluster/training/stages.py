"""Which layers, and so which weights and how much work, each stage of a pipeline has.

The embedding goes to the first stage; final norm, head and MTP modules to the last. Where a stage with the
embedding and one with MTP modules share a rank they share the table too; elsewhere the last stage needs a
copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from infra.cluster.counts.accounting import head_operations, layer_operations, mtp_operations
from infra.cluster.counts.weights import Weight, embedding_weights, head_weights, layer_weights, mtp_weights
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import Layout


def stage_layers(shape: ModelShape, layout: Layout) -> tuple[range, ...]:
    """The main layers of each stage, contiguous and in order: those that the layout names, or the split whose
    stages differ least in work (least sum of squares), each with a layer or more.

    The report's 61 layers on 16 stages lie as fifteen times 4 and once 1, since head and MTP module take
    nearly the time of five layers.
    """
    counts = layout.layers or _even_split(
        tuple(_layer_work(shape, layout)), _last_work(shape, layout), layout.stages
    )
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def settled(shape: ModelShape, layout: Layout) -> Layout:
    """The same layout with the layers of its stages written down, so that they are not sought again."""
    return replace(layout, layers=tuple(len(layers) for layers in stage_layers(shape, layout)))


def stage_work(shape: ModelShape, layout: Layout) -> tuple[float, ...]:
    """Forward operations a token of each stage."""
    work, last = _layer_work(shape, layout), _last_work(shape, layout)
    stages = [sum(work[layer] for layer in layers) for layers in stage_layers(shape, layout)]
    return (*stages[:-1], stages[-1] + last)


def imbalance(shape: ModelShape, layout: Layout) -> float:
    """Work of the fullest stage over the mean: what the pipeline's pace loses to an uneven split."""
    work = stage_work(shape, layout)
    return max(work) * len(work) / sum(work)


def notes(shape: ModelShape, layout: Layout) -> tuple[str, ...]:
    """What is allowed and should be known: an uneven split."""
    layout = settled(shape, layout)
    over = imbalance(shape, layout)
    if over < 1.005:
        return ()
    counts, work = layout.layers, stage_work(shape, layout)
    fullest = max(range(len(work)), key=work.__getitem__)
    return (
        f"{shape.num_hidden_layers} layers lie unevenly on {len(counts)} stages ({_runs(counts)}): stage "
        f"{fullest} has {over:.2f} times the mean work of a stage",
    )


def stage_weights(shape: ModelShape, layout: Layout, stage: int) -> tuple[Weight, ...]:
    """All weights that a stage reads."""
    weights = [w for layer in stage_layers(shape, layout)[stage] for w in layer_weights(shape, layer)]
    depths = range(shape.num_nextn_predict_layers)
    last = stage == layout.stages - 1
    if stage == 0 or (last and depths):
        weights += embedding_weights(shape)
    if last:
        weights += head_weights(shape)
        weights += [w for depth in depths for w in mtp_weights(shape, depth)]
    return tuple(weights)


def rank_weights(shape: ModelShape, layout: Layout, rank: int) -> tuple[Weight, ...]:
    """All weights on a pipeline rank, each once however many of its stages read it."""
    weights = {w.name: w for stage in layout.held(rank) for w in stage_weights(shape, layout, stage)}
    return tuple(weights.values())


def _layer_work(shape: ModelShape, layout: Layout) -> list[float]:
    dense = min(shape.first_k_dense_replace, shape.num_hidden_layers)
    sparse = shape.num_hidden_layers - dense
    first = layer_operations(shape, 0, layout.length).total if dense else 0.0
    later = layer_operations(shape, dense, layout.length).total if sparse else 0.0
    return [first] * dense + [later] * sparse


def _last_work(shape: ModelShape, layout: Layout) -> float:
    """What the last stage does beside its layers."""
    depths = range(shape.num_nextn_predict_layers)
    modules = sum(mtp_operations(shape, depth, layout.length).total for depth in depths)
    return head_operations(shape).total + modules


@lru_cache(maxsize=256)
def _even_split(work: tuple[float, ...], last: float, stages: int) -> tuple[int, ...]:
    """Dynamic programming over the layers of the first stages; the last stage has `last` beside its own."""
    sums = [0.0, *accumulate(work)]
    layers = len(work)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        extra = last if stage == stages - 1 else 0.0
        ends = range(stage + 1, layers - (stages - 1 - stage) + 1)
        # Of equal splits the one whose early stages are longer, so that the last, with the head, is not.
        best = {
            end: min(
                (
                    (cost + (sums[end] - sums[start] + extra) ** 2, (*counts, end - start))
                    for start, (cost, counts) in best.items()
                    if start < end
                ),
                key=lambda split: (split[0], [-count for count in split[1]]),
            )
            for end in ends
        }
    return best[layers][1]


def _runs(counts: Sequence[int]) -> str:
    """(4, 4, 4, 1) as '3 x 4, 1 x 1'."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][1] == count:
            runs[-1][0] += 1
        else:
            runs.append([1, count])
    return ", ".join(f"{times} x {count}" for times, count in runs)
