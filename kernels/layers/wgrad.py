"""Where and when weight gradients are computed (DeepSeek-V3 report, sections 3.2.1 and 3.3.2).

The gradient of a layer's input is waited for by the layer before it; that of its weight by nobody until the
optimizer steps. DualPipe and zero-bubble schedules therefore split the backward pass: B makes input
gradients at once, W makes weight gradients later, where the pipeline would idle. A layer that was given a
`WgradQueue` puts its W there. Either way a gradient goes where autograd would put it, or is added into an
FP32 buffer of the caller's, the main gradient, as the last step of its GEMM.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import torch

from kernels.formats.quantize import Quantized
from kernels.layers.products import Products

MainGrad: TypeAlias = torch.Tensor | Callable[[], torch.Tensor]
"""An FP32 buffer of its weight's shape, or a function that gives it whenever a gradient is to be added."""


class WgradQueue:
    """Weight-gradient GEMMs put off until `run`, in the order in which the backward pass came to them.

    It keeps their operands alive, which are FP8. Use one for each micro-batch, or for all that run in one
    order. As a context manager it insists on having been run:

        with WgradQueue() as queue:
            loss(queue).backward()      # input gradients alone
            queue.run()                 # weight gradients

    Work leaves the queue as it is done: to run twice adds nothing twice. A queue that dies with work left
    warns (RuntimeWarning), as those gradients are lost.
    """

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        """GEMMs waiting."""
        return len(self._work)

    def put(self, work: Callable[[], None]) -> None:
        """Put off `work`."""
        self._work.append(work)

    @torch.no_grad()
    def run(self) -> None:
        """Do what waits, first come first. On an error what failed is dropped and the rest keeps waiting."""
        while self._work:
            self._work.popleft()()

    def clear(self) -> int:
        """Drop what waits, as after a failed micro-batch; returns how much that was."""
        dropped = len(self._work)
        self._work.clear()
        return dropped

    def __enter__(self) -> WgradQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        dropped = self.clear()
        if dropped and kind is None:
            raise RuntimeError(
                f"WgradQueue: {dropped} weight gradients were never computed; call run() after the backward "
                "pass, or clear() to drop them"
            )

    def __del__(self) -> None:
        if self._work:
            warnings.warn(
                f"WgradQueue: {len(self._work)} weight gradients were lost; call run() after the backward "
                "pass, or clear() to drop them",
                RuntimeWarning,
                stacklevel=1,
            )


@dataclass(frozen=True)
class WgradTarget:
    """Where the gradient of `weight` goes: into `main_grad` or, without one, where autograd puts it; at once,
    or when `queue` runs.

    With a main gradient, autograd gives the weight no gradient, and runs no hook of it.

    Raises:
        ValueError, TypeError: `main_grad` does not fit the weight, or the weight of a queue is no leaf.
    """

    weight: torch.Tensor
    main_grad: MainGrad | None = None
    queue: WgradQueue | None = None

    def __post_init__(self) -> None:
        weight, main_grad = self.weight, self.main_grad
        if isinstance(main_grad, torch.Tensor):
            _check(main_grad, weight)
        elif main_grad is None and self.queue is not None and weight.requires_grad and not weight.is_leaf:
            raise ValueError(
                "a queue was given for a weight that is itself computed: when the queue runs, autograd has "
                "passed it; pass the leaf, or a main_grad"
            )

    def settle(self, products: Products, dy: Quantized, x: Callable[[], Quantized]) -> torch.Tensor | None:
        """Compute the gradient dy.T @ x or put it off; returns what the backward pass gives autograd.

        `dy` and what `x()` makes are tiles along the tokens. `x` is called when the gradient is computed: a
        queue holds what it holds.
        """
        weight, main_grad, queue = self.weight, self.main_grad, self.queue

        def add() -> None:
            buffer = main_grad
            if not isinstance(buffer, torch.Tensor):
                buffer = buffer()
                _check(buffer, weight)
            products.add_weight_gradient(dy, x(), buffer)

        def make() -> torch.Tensor:
            return products.weight_gradient(dy, x(), weight.shape, weight.dtype)

        def give() -> None:
            gradient = make()
            # As autograd does it, to the bit.
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

        if queue is not None:
            queue.put(give if main_grad is None else add)
            return None
        if main_grad is not None:
            add()
            return None
        return make()


def _check(main_grad: torch.Tensor, weight: torch.Tensor) -> None:
    if main_grad.dtype != torch.float32:
        raise TypeError(f"main_grad is {main_grad.dtype}; sums are kept in torch.float32")
    if main_grad.shape != weight.shape or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad has shape {tuple(main_grad.shape)}; the weight needs a contiguous "
            f"{tuple(weight.shape)}"
        )
    if main_grad.device != weight.device:
        raise ValueError(f"main_grad is on {main_grad.device} and the weight on {weight.device}")
