"""Micro-batches side by side on CPU cores, with the bits of running them one after the other.

Each lane is a Python thread with its own replica of the model: same parameter storage, own gradients.
PyTorch lets go of the interpreter lock inside its operators, so at small model sizes two lanes do nearly
twice the work, where two threads inside each small product do not. Gradients are added in micro-batch order
after every wave and every operator runs on one thread, so the number of lanes is placement: it changes no
bit of the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from model.heap import keep_freed_memory
from model.precision import steady_weights
from model.transformer import Transformer

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """Use as a context manager. `count` lanes; 1 runs everything in the calling thread."""

    def __init__(self, model: Transformer, count: int) -> None:
        self.replicas = [model] + [_replica(model) for _ in range(count - 1)]
        self._pool = (
            ThreadPoolExecutor(count - 1, initializer=torch.set_num_threads, initargs=(1,))
            if count > 1
            else None
        )
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Lanes:
        keep_freed_memory()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if self._pool is not None:
            self._pool.shutdown()

    def gradients(self, work: Callable[[Transformer, T], R], items: Sequence[T]) -> list[R]:
        """`work(model, item)` for every item, its backward pass included; gradients end up in the model.
        `work` writes no weight.

        Bits are those of calling `work` in order on the model itself.
        """
        results: list[R] = []
        with steady_weights(replica.precision for replica in self.replicas):
            for start in range(0, len(items), len(self.replicas)):
                results += self._wave(work, items[start : start + len(self.replicas)])
        return results

    def _wave(self, work: Callable[[Transformer, T], R], items: Sequence[T]) -> list[R]:
        """One item a lane."""
        main, *twins = self.replicas
        others = [
            self._pool.submit(work, replica.train(), item)
            for replica, item in zip(twins, items[1:], strict=False)
            if self._pool is not None
        ]
        results = [work(main.train(), items[0])]
        for replica, other in zip(twins, others, strict=False):
            results.append(other.result())
            self._add_gradients(replica)
        return results

    def _add_gradients(self, replica: Transformer) -> None:
        """Every lane takes its share of the parameters, each of which is added in one thread."""
        pairs = list(zip(self.replicas[0].parameters(), replica.parameters(), strict=True))
        count = len(self.replicas)
        others = [
            self._pool.submit(_add_gradients, pairs[lane::count])
            for lane in range(1, count)
            if self._pool is not None
        ]
        _add_gradients(pairs[::count])
        for other in others:
            other.result()


def _replica(model: Transformer) -> Transformer:
    """A second module over the same parameters and buffers."""
    twin = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.data = mine.data
        theirs.grad = None
    shared = dict(model.named_buffers())
    for name, module in twin.named_modules():
        for key in module._buffers:
            module._buffers[key] = shared[f"{name}.{key}" if name else key]
    return twin


def _add_gradients(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for mine, theirs in pairs:
        if theirs.grad is None:
            continue
        if mine.grad is None:
            mine.grad = theirs.grad
        else:
            mine.grad.add_(theirs.grad)
        theirs.grad = None
