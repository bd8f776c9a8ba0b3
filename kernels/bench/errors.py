"""Checking: errors against the oracles, and on a GPU bits against those of the references on the CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

import torch

from kernels.bench.entry import Draw, Entry, each_tensor, tensors
from kernels.figures import Row, at_most, guarded


def check(entries: Iterable[Entry], device: torch.device, seed: int) -> Iterator[Row]:
    """The worst error of each function over its operands and sizes. One that raises is a row that fails."""
    ordered = sorted(entries, key=lambda entry: (entry.name, entry.measure))
    for (name, measure), group in groupby(ordered, key=lambda entry: (entry.name, entry.measure)):
        yield from guarded(f"{name}: {measure}", partial(_rows, name, measure, list(group), device, seed))


def _rows(name: str, measure: str, group: list[Entry], device: torch.device, seed: int) -> Iterator[Row]:
    errors, unlike = [0.0], 0
    for entry in group:
        for sizes in entry.checked:
            inputs = entry.make(Draw(device, seed, rough=True), *sizes)
            with poisoned():
                found = entry.call(*each_tensor(torch.clone, inputs))
            errors.append(float(entry.error(inputs, found)))
            if device.type == "cuda":
                expected = entry.call(*each_tensor(torch.Tensor.cpu, inputs))
                unlike += differing(found, expected, entry.exact)
    # A NaN is the worst of all; max alone would lose it.
    worst = max(errors, key=lambda error: (error != error, error))
    yield at_most(f"{name}: {measure}", "", worst, group[0].limit)
    if device.type == "cuda" and any(entry.exact != () for entry in group):
        yield at_most(f"{name}: elements unlike the reference's ({measure})", "", unlike, 0)


def differing(found: object, expected: object, which: tuple[int, ...] | None = None) -> int:
    """How many elements of two nests of tensors differ in their bits: of all tensors, or of those in `which`.
    NaN is NaN, whatever its bits."""
    count = 0
    for index, (ours, theirs) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
        if which is None or index in which:
            ours = ours.cpu()
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                count += max(ours.numel(), theirs.numel(), 1)
            elif ours.dtype.is_floating_point:
                both_nan = ours.float().isnan() & theirs.float().isnan()
                sign = torch.signbit(ours.float()) != torch.signbit(theirs.float())
                count += int(((ours.float() != theirs.float()) | sign)[~both_nan].sum())
            else:
                count += int((ours != theirs).sum())
    return count


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, or the largest integer: an output that is not written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some function of torch has no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
