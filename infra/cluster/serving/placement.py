"""Where the copies of the experts go, so that GPUs carry like loads (report §3.4, redundant experts).

Hierarchical, where nodes divide the expert groups: whole groups go to nodes, so that group-limited routing
still reaches few nodes; copies are made and spread inside each node. Otherwise global: over all GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from infra.cluster.serving.packing import CLOSE, Floats, Ints, pack
from infra.cluster.serving.replication import copies, recount_pairs, replicate
from infra.errors import ConfigError

FAINT = 1e-9
"""Load that an expert counts for at least, of the mean, so that idle experts share spare copies evenly."""

APART = 0.01
"""What it must gain to put copies of one expert on one GPU, where the second takes memory for nothing."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The experts in the slots of every layer. Slots are in the order of GPUs, GPUs in the order of nodes.

    Raises ConfigError where slots do not divide over GPUs or an expert has none.
    """

    slots: Ints
    """[layers, replicas]: the expert in each slot."""
    experts: int
    gpus: int

    def __post_init__(self) -> None:
        if self.slots.ndim != 2 or not np.issubdtype(self.slots.dtype, np.integer):
            raise ConfigError("placement.slots must be whole numbers [layers, replicas]")
        _divides("slots", self.slots.shape[1], "gpus", self.gpus)
        if self.slots.size and not (self.slots.min() >= 0 and self.slots.max() < self.experts):
            raise ConfigError(f"placement.slots names an expert outside 0 to {self.experts - 1}")
        missing = np.argwhere(self.counts == 0)
        if len(missing):
            layer, expert = missing[0]
            raise ConfigError(f"placement.slots: expert {expert} has no slot in layer {layer}")
        own = self.slots.copy()
        own.flags.writeable = False
        object.__setattr__(self, "slots", own)

    @cached_property
    def counts(self) -> Ints:
        """[layers, experts]: copies of each expert."""
        layers = len(self.slots)
        where = self.slots + self.experts * np.arange(layers)[:, None]
        return np.bincount(where.ravel(), minlength=layers * self.experts).reshape(layers, self.experts)

    @cached_property
    def expert_slots(self) -> Ints:
        """[layers, experts, most copies]: the slots of each expert in ascending order, then -1."""
        order = np.argsort(self.slots, axis=1, kind="stable")
        ordered = np.take_along_axis(self.slots, order, 1)
        start = np.cumsum(self.counts, 1) - self.counts
        rank = np.arange(order.shape[1]) - np.take_along_axis(start, ordered, 1)
        found = np.full((*self.counts.shape, int(self.counts.max(initial=0))), -1, dtype=np.intp)
        found[np.arange(len(order))[:, None], ordered, rank] = order
        return found

    def gpu_load(self, load: ArrayLike) -> Floats:
        """[layers, gpus]: the load of each GPU when each expert's `load` [layers, experts] is shared equally
        by its copies."""
        each = _loads(load, self.counts.shape) / self.counts
        in_slots = np.take_along_axis(each, self.slots, 1)
        return in_slots.reshape(len(self.slots), self.gpus, -1).sum(2)

    def imbalance(self, load: ArrayLike) -> Floats:
        """[layers]: load of the fullest GPU over the mean; 1 is perfect, and also where there is no load."""
        found = self.gpu_load(load)
        mean = found.mean(1)
        return np.divide(found.max(1), mean, out=np.ones_like(mean), where=mean > 0)


def place(load: ArrayLike, replicas: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Place `replicas` copies of the experts of every layer, the same number on each GPU.

    The result depends on the arguments alone. Where possible copies of an expert are on different GPUs.

    Args:
        load: [layers, experts], not negative: tokens of each expert, as measured or forecast.
        replicas: Slots of a layer; a multiple of `gpus`, at least as many as experts.
        groups: Expert groups of the router, consecutive and equally large.
        nodes: If they divide `groups`, groups stay whole on nodes.
        gpus: A multiple of `nodes`.

    Raises:
        ConfigError: a number does not divide as it must, or a load is negative or not finite.
    """
    load = _loads(load, None)
    layers, experts = load.shape
    for name, value in (("replicas", replicas), ("groups", groups), ("nodes", nodes), ("gpus", gpus)):
        if value < 1:
            raise ConfigError(f"placement: {name} is {value}: it must be at least 1")
    _divides("gpus", gpus, "nodes", nodes)
    _divides("replicas", replicas, "gpus", gpus)
    _divides("experts", experts, "groups", groups)
    if replicas < experts:
        raise ConfigError(
            f"placement: replicas is {replicas}, fewer than the {experts} experts; "
            f"{-(-experts // gpus) * gpus} would do"
        )
    floor = FAINT * load.mean(1, keepdims=True)
    load = np.where(load.max(1, keepdims=True) > 0, np.maximum(load, floor), 1.0)
    if groups % nodes:
        groups = nodes = 1
    by_group = load.reshape(layers, groups, -1).sum(2)
    node = pack(by_group, np.tile(np.arange(groups), (layers, 1)), nodes)
    slots, heaviest = _fill(load, node, nodes, replicas, gpus)
    active = np.arange(layers if nodes > 1 else 0)
    while len(active):
        # A trade of two groups may leave nodes less even and yet allow a lighter fullest GPU.
        layer, traded = _trades(by_group[active], node[active], heaviest[active] * (gpus // nodes))
        if not len(layer):
            break
        layer = active[layer]
        found, fullest = _fill(load[layer], traded, nodes, replicas, gpus)
        order = np.lexsort((fullest, layer))
        first = order[np.unique(layer[order], return_index=True)[1]]
        first = first[fullest[first] < heaviest[layer[first]] * (1 - CLOSE)]
        active = layer[first]
        node[active], slots[active], heaviest[active] = traded[first], found[first], fullest[first]
    return Placement(slots, experts, gpus)


def _fill(load: Floats, node: Ints, nodes: int, replicas: int, gpus: int) -> tuple[Ints, Floats]:
    """Copies on the GPUs of each node, given the node of each group [layers, groups]: the experts in the
    slots [layers, replicas] and the load of the fullest GPU [layers]."""
    layers, experts = load.shape
    size = experts // node.shape[1]
    groups = np.argsort(node, axis=1, kind="stable")
    names = (groups[:, :, None] * size + np.arange(size)).reshape(layers, experts)
    # From here on each node of each layer is a row of its own.
    local = np.take_along_axis(load, names, 1).reshape(layers * nodes, -1)
    names = names.reshape(layers * nodes, -1)
    room, per_node = replicas // nodes, gpus // nodes
    # The fullest GPU of the fullest node cannot be below that node's mean: no other need be below it either.
    mean = local.sum(1).reshape(layers, nodes) / per_node
    target = np.repeat(mean.max(1), nodes)
    counts = replicate(local, room, per_node)
    inside, fullest = _spread(local, counts, per_node, target)
    if room == 2 * per_node:
        counts = recount_pairs(local, counts, per_node, target)
        other, lighter = _spread(local, counts, per_node, target)
        better = lighter < fullest
        inside[better], fullest[better] = other[better], lighter[better]
    slots = np.take_along_axis(names, inside, 1)
    return slots.reshape(layers, replicas), fullest.reshape(layers, nodes).max(1)


def _spread(load: Floats, counts: Ints, gpus: int, target: Floats) -> tuple[Ints, Floats]:
    """Pack copies on GPUs: the experts in the slots [N, replicas], in the order of GPUs and on each of
    experts, and the load of the fullest GPU [N].

    Copies of an expert come together on a GPU only where that makes the fullest lighter by more than `APART`.
    """
    labels = copies(counts)
    each = np.take_along_axis(load / counts, labels, 1)
    placed, fullest = _packed(each, labels, gpus, target)
    row = np.flatnonzero(fullest > target * (1 + APART))
    if len(row):
        anything = np.tile(np.arange(labels.shape[1]), (len(row), 1))
        other, lighter = _packed(each[row], anything, gpus, target[row])
        better = lighter * (1 + APART) < fullest[row]
        placed[row[better]], fullest[row[better]] = other[better], lighter[better]
    return np.take_along_axis(labels, np.lexsort((labels, placed)), 1), fullest


def _packed(each: Floats, labels: Ints, gpus: int, target: Floats) -> tuple[Ints, Floats]:
    """The GPU of each copy [N, replicas] and the load of the fullest GPU [N]."""
    placed = pack(each, labels, gpus, target)
    load = np.zeros((len(each), gpus))
    np.add.at(load, (np.arange(len(each))[:, None], placed), each)
    return placed, load.max(1)


def _trades(by_group: Floats, node: Ints, limit: Floats) -> tuple[Ints, Ints]:
    """Every trade of two groups between nodes that leaves all nodes below `limit` [layers]: the layer of each
    trade and the node of each group after it [trades, groups]."""
    one, other = np.triu_indices(node.shape[1], k=1)
    layer, trade = np.nonzero(node[:, one] != node[:, other])
    traded, row = node[layer], np.arange(len(layer))
    one, other = one[trade], other[trade]
    traded[row, one], traded[row, other] = node[layer, other], node[layer, one]
    load = np.zeros((len(layer), int(node.max(initial=0)) + 1))
    np.add.at(load, (row[:, None], traded), by_group[layer])
    kept = load.max(1) < limit[layer] * (1 - CLOSE)
    return layer[kept], traded[kept]


def _loads(load: ArrayLike, shape: tuple[int, ...] | None) -> Floats:
    found = np.asarray(load, dtype=np.float64)
    if found.ndim != 2 or 0 in found.shape or (shape is not None and found.shape != shape):
        wanted = "[layers, experts]" if shape is None else str(list(shape))
        raise ConfigError(f"placement: load has shape {list(found.shape)}: it must have {wanted}")
    if not np.isfinite(found).all() or found.min() < 0:
        raise ConfigError("placement: load has entries that are negative or not finite: it counts tokens")
    return found


def _divides(name: str, value: int, by: str, divisor: int) -> None:
    if divisor < 1 or value % divisor:
        near = max(1, round(value / max(divisor, 1))) * max(divisor, 1)
        raise ConfigError(
            f"placement: {name} is {value}, not a multiple of the {divisor} {by}; the nearest is {near}"
        )
