"""What a profiler's kernel trace says of overlap: how busy computation and communication were, and how much
of the one was hidden behind the other."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.cluster.pipeline.chrome_trace import MICROSECONDS, TraceError, read_events

COMMUNICATION = r"nccl|nvshmem|deep_ep|\bep::(internode|intranode)\b"
"""Names of kernels that move data between devices: NCCL's, NVSHMEM's, DeepEP's."""
CLASSES: dict[str, str] = {
    "attention": r"flash|attn|attention|\bmla",
    "casts and transposes": r"(cast|quant|transpose)\w*(<|\(|$)",
    "grouped GEMM": r"[mk]_grouped|grouped_mm",
    "GEMM": r"[gG]emm|cublas|cutlass",
    "norms": r"norm(?!al)",
}
"""Kernels of computation by name, the first that matches; what none matches is "other"."""

Span = tuple[float, float]


@dataclass(frozen=True)
class KernelClass:
    """Kernels of one class: how many, and the sum of their seconds. Those side by side count each in full."""

    name: str
    kernels: int
    seconds: float


@dataclass(frozen=True)
class KernelSummary:
    """A trace's kernels on one device, in seconds."""

    kernels: int
    span: float
    """From the first start to the last end."""
    computation: float
    """In which at least one kernel computes."""
    communication: float
    """In which at least one kernel communicates."""
    hidden: float
    """In which both do."""
    classes: tuple[KernelClass, ...]
    """Longest first."""

    @property
    def hidden_share(self) -> float:
        """Of the time in which kernels communicate, the share in which others compute; 1 without any."""
        return self.hidden / self.communication if self.communication else 1.0

    @property
    def idle(self) -> float:
        """Seconds in which no kernel runs."""
        return self.span - self.computation - self.communication + self.hidden


def summarise(
    path: Path,
    communication: str = COMMUNICATION,
    streams: Collection[int] = (),
    classes: Mapping[str, str] = CLASSES,
) -> KernelSummary:
    """Read a trace of torch's profiler.

    A kernel communicates if its name matches `communication` (a regular expression, searched) or it ran on
    one of `streams`; of the others, `classes` gives the class by name.

    Raises:
        TraceError: The file is no trace, holds no kernels, or those of several devices.
    """
    kernels = [event for event in read_events(path) if event.get("cat") == "kernel"]
    if not kernels:
        raise TraceError(f"{path}: holds no kernels (category `kernel`); profile with ProfilerActivity.CUDA")
    devices = {event["args"].get("device", event.get("pid")) for event in kernels}
    if len(devices) > 1:
        raise TraceError(f"{path}: holds kernels of {len(devices)} devices; give the trace of one")
    moving, computing = [], []
    sums: dict[str, tuple[int, float]] = {}
    for event in kernels:
        name = str(event.get("name"))
        moves = re.search(communication, name) or event["args"].get("stream") in streams
        label = "communication" if moves else _label(name, classes)
        (moving if moves else computing).append((event["ts"], event["ts"] + event["dur"]))
        count, seconds = sums.get(label, (0, 0.0))
        sums[label] = count + 1, seconds + event["dur"] / MICROSECONDS
    computing, moving = merged(computing), merged(moving)
    both = merged(computing + moving)
    busy, moved, either = map(_length, (computing, moving, both))
    return KernelSummary(
        kernels=len(kernels),
        span=(both[-1][1] - both[0][0]) / MICROSECONDS,
        computation=busy / MICROSECONDS,
        communication=moved / MICROSECONDS,
        hidden=(busy + moved - either) / MICROSECONDS,
        classes=tuple(
            KernelClass(label, *sums[label]) for label in sorted(sums, key=lambda label: -sums[label][1])
        ),
    )


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of intervals as disjoint ones, in order."""
    union: list[Span] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def _label(name: str, classes: Mapping[str, str]) -> str:
    return next((label for label, pattern in classes.items() if re.search(pattern, name)), "other")
