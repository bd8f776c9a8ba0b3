"""How long calls take: in turns with their peers, and on a GPU with nothing of them left in the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Written before every timed call: larger than any L2 cache, and long enough to write (most of a millisecond)
# that the host has queued the call, of many launches perhaps, before the GPU reaches it.
FLUSH_BYTES = 2**31
COPY_BYTES = 2**31
PRODUCT = 8192

Call = Callable[[], object]
Clock = Callable[[Call], tuple[float, ...]]


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in the same run: the limits that kernels are measured against."""

    copy: float  # GB/s, bytes read and written
    product: float  # TFLOPS, in BF16

    def of(self, unit: str) -> float:
        return self.product if unit == "TFLOPS" else self.copy


def cpu_clock(call: Call) -> tuple[float, ...]:
    """Milliseconds of one call: wall clock, and CPU time of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def gpu_clock() -> Clock:
    """Milliseconds of one call on the GPU, by its own events."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def clock(call: Call) -> tuple[float, ...]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return (start.elapsed_time(end),)

    return clock


def in_turns(calls: Mapping[str, Call], clock: Clock, rounds: int) -> dict[str, tuple[float, ...]]:
    """Median times of each call, one after the other in every round; a round before compiles and warms up."""
    for call in calls.values():
        call()
    taken = [{name: clock(call) for name, call in calls.items()} for _ in range(rounds)]
    return {
        name: tuple(map(statistics.median, zip(*(times[name] for times in taken), strict=True)))
        for name in calls
    }


def ceilings(clock: Clock, rounds: int) -> Ceilings:
    """A large copy on the GPU, and a large cuBLAS product of random BF16 matrices."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn((PRODUCT, PRODUCT), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b.t()}
    times = in_turns(calls, clock, rounds)
    return Ceilings(2e-6 * COPY_BYTES / times["copy"][0], 2e-9 * PRODUCT**3 / times["product"][0])
