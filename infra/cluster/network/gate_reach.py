"""Where a real gate sends tokens: its rule on independent scores, sampled.

Uniform routing, which `all_to_all.reach` counts exactly, reaches too few nodes: the gate picks the groups
with the best experts (report §2.1.2), so nearly every chosen node is used.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from infra.cluster.network.all_to_all import Reach
from infra.cluster.network.even_split import even_split
from infra.cluster.shape import ModelShape

SAMPLES = 8_000
"""Tokens drawn, always the same ones: the counts are off by less than one in a hundred."""


def gate_reach(shape: ModelShape, gpus: int, gpus_per_node: int, node_limited: bool = True) -> Reach:
    """As `reach`, for a gate that scores groups by their two best experts and keeps `topk_group` of them.

    `gpus` need not divide the experts: a unit that serves may hold spare copies, and its runs of experts are
    then as equal as whole experts allow. Without `node_limited` the best experts of all are picked, which
    with independent scores are any: what `reach` counts.
    """
    nodes, in_node = even_split(gpus, gpus_per_node)
    node, gpu = _sampled(
        shape.n_routed_experts,
        shape.n_group if node_limited else 1,
        shape.topk_group if node_limited else 1,
        shape.num_experts_per_tok,
        nodes,
        gpus,
    )
    return Reach(nodes, in_node, node, gpu)


@lru_cache(maxsize=64)
def _sampled(experts: int, groups: int, kept: int, chosen: int, nodes: int, gpus: int) -> tuple[float, float]:
    """Probabilities that a token has an expert on a given node and on a given GPU."""
    scores = np.random.default_rng(0).random((SAMPLES, groups, experts // groups))
    best = np.sort(scores, axis=2)[:, :, -2:].sum(axis=2)
    dropped = np.argsort(best, axis=1)[:, : groups - kept]
    np.put_along_axis(scores, dropped[:, :, None], -1.0, axis=1)
    flat = scores.reshape(SAMPLES, experts)
    picked = np.argpartition(flat, experts - chosen, axis=1)[:, experts - chosen :]

    def reached(parts: int) -> float:
        used = np.zeros((SAMPLES, parts), dtype=bool)
        np.put_along_axis(used, picked * parts // experts, True, axis=1)
        return float(used.mean())

    return reached(nodes), reached(gpus)
