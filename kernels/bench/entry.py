"""What the benchmark knows of a kernel: data that one runner checks (`errors.py`) and times (`times.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Sizes = tuple[int, ...]
Inputs = tuple[Any, ...]


class Draw:
    """Random inputs on a device. Those that are checked have outliers (1%) and zeros of either sign (5%);
    those that are timed are normal throughout, since a product of zeros takes less power."""

    def __init__(self, device: torch.device, seed: int, *, rough: bool) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.rough = rough

    def values(self, *shape: int, dtype: torch.dtype = torch.float32, outliers: float = 10.0) -> torch.Tensor:
        """Normal values; of those that are checked some are larger by `outliers`. The larger, the more is
        the error of a product rounded to BF16 that of its few largest elements, and varies."""
        x = torch.randn(shape, generator=self.generator, device=self.device)
        if self.rough:
            chance = self.uniform(*shape)
            x = torch.where(chance < 0.01, x * outliers, torch.where(chance > 0.95, x * 0, x))
        return x.to(dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Shape:
    """Sizes that are timed, and the layer of the model that has them."""

    layer: str
    sizes: Sizes

    def __str__(self) -> str:
        return f"{self.layer} {'x'.join(map(str, self.sizes))}".strip()


@dataclass(frozen=True)
class Peer:
    """Someone else's implementation of the same function.

    `build` takes the inputs of the entry's call, prepares its own (untimed) and returns what is timed. What
    it raises says why the peer is not available. A peer that is `alike` returns what the entry's call returns
    as its first tensor, within the rounding of FP8: the runner refuses to time one that does not.
    `goal` is the speed that ours should have, times the peer's, `published` speeds that its authors state.
    """

    name: str
    build: Callable[..., Callable[[], Any]]
    device: str = "cuda"
    alike: bool = True
    goal: float | None = None
    published: Mapping[Sizes, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One public function, on one kind of operands.

    make        inputs of the given sizes: make(draw, *sizes)
    call        what is checked and timed: call(*inputs). It may change its inputs.
    error       how far its outputs are from an independent computation: error(inputs, outputs). `measure`
                says in which terms; it may not exceed `limit`.
    checked     sizes that are checked; `exact`, outputs whose bits must be those of the reference (by index,
                of the outputs' tensors in order; None: all)
    timed       shapes that are timed on a GPU; on a CPU the reference is timed on `small`
    flops       operations, a multiply-add being two
    moved       bytes: each input read once, each output written once
    unit        what the speed is given in: TFLOPS if the tensor cores set its limit, GB/s if the memory does
    goal        the speed that it should reach; `share`, the part of the machine's measured ceiling
    launches    the same call in each of its launch shapes, by name: launches(*inputs), for --sweep
    kernel      the function that launches the kernel, where it is not `name`_triton
    """

    name: str
    operands: str
    make: Callable[..., Inputs]
    call: Callable[..., Any]
    error: Callable[[Inputs, Any], float]
    measure: str
    limit: float
    checked: Sequence[Sizes]
    moved: Callable[..., int]
    flops: Callable[..., int] = lambda *sizes: 0
    exact: tuple[int, ...] | None = None
    timed: Sequence[Shape] = ()
    small: Sizes | None = None
    unit: str = "GB/s"
    peers: Sequence[Peer] = ()
    goal: float | None = None
    share: float | None = None
    launches: Callable[..., Mapping[str, Callable[[], Any]]] | None = None
    kernel: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.operands}".strip()


def each_tensor(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value`, a nest of tuples and dataclasses, with `function` applied to each of its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(each_tensor(function, part) for part in value)
    if dataclasses.is_dataclass(value):
        parts = {f.name: each_tensor(function, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nest of tuples and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from tensors(getattr(value, f.name))
