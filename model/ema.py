"""Exponential moving average of the parameters, kept in CPU memory and blended beside the next step (report
§3.2.3).

It previews what the model will be worth once its learning rate has decayed. The report does not publish the
decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """`decay` of the old average a step. Parameters are copied at once, so that the next step may change
    them; the arithmetic runs in a thread of its own. Averages are float32 on the CPU whatever the model's
    device is."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema decay is {decay}: it must lie between 0 and 1")
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        on_gpu = any(p.is_cuda for p in self._parameters.values())
        self._average = {name: p.detach().float().cpu().clone() for name, p in self._parameters.items()}
        # Page-locked memory is what a copy from a GPU can run beside its kernels into.
        self._copy = {name: torch.empty_like(t, pin_memory=on_gpu) for name, t in self._average.items()}
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="ema", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._blending: Future[None] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        self._wait()
        arrived = None
        for name, parameter in self._parameters.items():
            self._copy[name].copy_(parameter, non_blocking=True)
        if any(p.is_cuda for p in self._parameters.values()):
            arrived = torch.cuda.Event()
            arrived.record()
        self._blending = self._pool.submit(self._blend, arrived)

    @torch.no_grad()
    def _blend(self, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        for name, average in self._average.items():
            average.lerp_(self._copy[name], 1 - self.decay)

    def _wait(self) -> None:
        if self._blending is not None:
            self._blending.result()
            self._blending = None

    def tensors(self) -> dict[str, Tensor]:
        """The average of every parameter by name; float32 on the CPU, alive until the next update."""
        self._wait()
        return self._average

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from averages that `tensors` gave earlier."""
        self._wait()
        for name, average in self._average.items():
            average.copy_(tensors[name])

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model has the averages for parameters inside the block, and its own again behind it."""
        average = self.tensors()
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.copy_(average[name])
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.copy_(own[name])

    def close(self) -> None:
        """Wait for what runs and end the thread."""
        self._wait()
        self._pool.shutdown()
