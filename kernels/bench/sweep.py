"""Tuning: a kernel in every one of its launch shapes, on the shapes of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from kernels.bench.clock import Clock, gpu_clock, in_turns
from kernels.bench.entry import Draw, Entry, Shape, each_tensor, tensors
from kernels.bench.times import work
from kernels.figures import Row, against, guarded
from kernels.metrics import MAX_ERROR_BF16, relative_error

ROUNDS = 15


def sweep_gpu(entries: Iterable[Entry], seed: int) -> Iterator[list[Row]]:
    """Rows of each shape of each entry that has launch shapes to choose from."""
    clock = gpu_clock()
    for entry in entries:
        if entry.launches is not None:
            for shape in entry.timed:
                draw = Draw(torch.device("cuda"), seed, rough=False)
                yield list(guarded(f"{entry} {shape}", partial(sweep, entry, shape, draw, clock)))
                torch.cuda.empty_cache()


def sweep(entry: Entry, shape: Shape, draw: Draw, clock: Clock) -> Iterator[Row]:
    """The speed of each launch shape, and last the best beside the one that the function takes by itself.

    One that cannot be launched, or whose result is another, is a row that says so.
    """
    inputs = entry.make(draw, *shape.sizes)
    expected = next(tensors(entry.call(*each_tensor(torch.clone, inputs))))
    calls: dict[str, Callable[[], Any]] = {}
    for launch, call in entry.launches(*each_tensor(torch.clone, inputs)).items():
        failed = list(guarded(f"{entry} {shape} by {launch}", partial(_compare, call, expected)))
        yield from failed
        if not failed:
            calls[launch] = call
    times = in_turns({"chosen": partial(entry.call, *inputs), **calls}, clock, ROUNDS)
    speeds = {launch: work(entry, shape) / taken[0] for launch, taken in times.items()}
    chosen = speeds.pop("chosen")
    for launch, speed in speeds.items():
        yield Row(f"{entry} {shape} by {launch}", entry.unit, speed)
    if speeds:
        best = max(speeds, key=speeds.__getitem__)
        yield against(f"{entry} {shape}: best by {best}", entry.unit, speeds[best], chosen, "as chosen")


def _compare(call: Callable[[], Any], expected: torch.Tensor) -> Iterator[Row]:
    error = relative_error(next(tensors(call())), expected)
    if not error < MAX_ERROR_BF16:
        raise RuntimeError(f"the result differs by {error:.3g}")
    yield from ()
