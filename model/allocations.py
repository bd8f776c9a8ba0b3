"""How much memory torch takes on the CPU during a call, counted from its allocator's own events.

Exact and repeatable, where a process's resident size is neither: it counts each byte that tensors took and
gave back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def allocations(call: Callable[[], T]) -> tuple[T, int, int]:
    """(what `call` returned, bytes that it still holds, most bytes that it held at once).

    Memory that was taken before counts as nothing, and as less than nothing when `call` frees it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    held = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return result, held, peak
