"""Timing: each kernel on the shapes of the model, beside its peers and the ceilings of the machine.

All rows of one case bear its name; their units tell them apart:

    us                 how long a call takes
    TFLOPS, GB/s       its speed; with a peer also the peer's, and the ratio of the two, which is then what a
                       goal is for. A peer that is not available is a row without figures of its own.
    of ceiling         its speed over that of a large copy (GB/s) or of cuBLAS's BF16 product (TFLOPS)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from kernels.bench.clock import Ceilings, Clock, ceilings, cpu_clock, gpu_clock, in_turns
from kernels.bench.entry import Draw, Entry, Inputs, Peer, Shape, tensors
from kernels.figures import Row, against, at_least, guarded
from kernels.metrics import relative_error

ROUNDS, CPU_ROUNDS = 25, 5
ALIKE = 0.1  # relative error of a peer's result: FP8 with one scale a row or a tensor is 4% from ours


def time_gpu(entries: Iterable[Entry], seed: int) -> Iterator[list[Row]]:
    """Rows of each case. A case that raises is a row that says so."""
    clock = gpu_clock()
    limits = ceilings(clock, ROUNDS)
    yield [
        Row("ceiling: copy, bytes read and written", "GB/s", limits.copy),
        Row("ceiling: cuBLAS BF16 8192x8192x8192", "TFLOPS", limits.product),
    ]
    for entry in entries:
        for shape in entry.timed:
            draw = Draw(torch.device("cuda"), seed, rough=False)
            yield list(guarded(f"{entry} {shape}", partial(measure, entry, shape, draw, clock, limits)))
            torch.cuda.empty_cache()


def time_cpu(entries: Iterable[Entry], seed: int) -> Iterator[list[Row]]:
    """Rows of each reference on its small shape, beside the same in torch."""
    for entry in entries:
        if entry.small is not None:
            shape = Shape("reference", entry.small)
            yield list(guarded(f"{entry} {shape}", partial(_cpu_rows, entry, shape, seed)))


def measure(entry: Entry, shape: Shape, draw: Draw, clock: Clock, limits: Ceilings) -> Iterator[Row]:
    """The rows of one case."""
    calls, missing = prepare(entry, entry.make(draw, *shape.sizes), draw.device)
    times = in_turns(calls, clock, ROUNDS)
    speeds = {name: work(entry, shape) / taken[0] for name, taken in times.items()}
    yield from case_rows(f"{entry} {shape}", entry, shape, 1e3 * times["ours"][0], speeds, limits, missing)


def case_rows(
    name: str,
    entry: Entry,
    shape: Shape,
    microseconds: float,
    speeds: dict[str, float],
    limits: Ceilings,
    missing: dict[str, str],
) -> Iterator[Row]:
    """The rows of one case from what was measured: speeds of ours and of the peers, in the entry's unit."""
    ours, share = speeds["ours"], speeds["ours"] / limits.of(entry.unit)
    yield Row(name, "us", microseconds)
    yield Row(name, entry.unit, ours) if entry.goal is None else at_least(name, entry.unit, ours, entry.goal)
    if entry.share is None:
        yield Row(name, "of ceiling", share)
    else:
        yield at_least(name, "of ceiling", share, entry.share)
    for peer in entry.peers:
        if peer.name in speeds:
            yield _against(name, entry, shape, ours, speeds[peer.name], peer)
        elif peer.name in missing:
            why = f"{peer.name} (not available: {missing[peer.name]})"
            yield Row(name, entry.unit, ours, peer_name=why, published=peer.published.get(shape.sizes))


def _against(name: str, entry: Entry, shape: Shape, ours: float, theirs: float, peer: Peer) -> Row:
    published = peer.published.get(shape.sizes)
    row = against(name, entry.unit, ours, theirs, peer.name, published)
    if peer.goal is None:
        return row
    return Row(
        name, entry.unit, ours, theirs, peer.name, row.ratio, peer.goal, published, ours / theirs >= peer.goal
    )


def work(entry: Entry, shape: Shape) -> float:
    """What a millisecond must divide to give the speed in the entry's unit."""
    if entry.unit == "TFLOPS":
        return 1e-9 * entry.flops(*shape.sizes)
    return 1e-6 * entry.moved(*shape.sizes)


def _cpu_rows(entry: Entry, shape: Shape, seed: int) -> Iterator[Row]:
    draw = Draw(torch.device("cpu"), seed, rough=False)
    calls, _ = prepare(entry, entry.make(draw, *shape.sizes), draw.device)
    times = in_turns(calls, cpu_clock, CPU_ROUNDS)
    for index, kind in enumerate(("wall", "CPU time")):
        label, ours = f"{entry} {shape} on cpu, {kind}", times["ours"][index]
        peers = [peer.name for peer in entry.peers if peer.name in times]
        for peer in peers:
            yield against(label, "ms", ours, times[peer][index], peer)
        if not peers:
            yield Row(label, "ms", ours)


def prepare(
    entry: Entry, inputs: Inputs, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Our call and those of the peers that are available here, and why the others are not.

    Raises:
        RuntimeError: a peer's result is not ours: a comparison of speeds would mean nothing.
    """
    calls: dict[str, Callable[[], Any]] = {"ours": partial(entry.call, *inputs)}
    missing: dict[str, str] = {}
    for peer in entry.peers:
        if peer.device not in (device.type, "any"):
            continue
        try:
            call = peer.build(*inputs)
            theirs = call()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            missing[peer.name] = f"{type(error).__name__}: {reason}"
            continue
        if peer.alike:
            error = relative_error(next(tensors(theirs)), next(tensors(calls["ours"]())))
            if not error < ALIKE:
                raise RuntimeError(f"{peer.name} differs from ours by {error:.3g}")
        calls[peer.name] = call
    return calls, missing
