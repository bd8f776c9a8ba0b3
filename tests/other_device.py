"""A second device for tests on a machine that has only a CPU.

Inside `other_device()` a tensor can be made on, or moved to, `DEVICE`. It computes on the CPU, but says
that it is elsewhere, and an operator that is given tensors of both devices raises, as it would with a GPU:
code that forgets to follow the device of its model fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from model.engine.engine import Engine

# A device type whose backward passes run in the calling thread, and that nothing else here uses.
DEVICE = torch.device("lazy", 0)
_aten = torch.ops.aten
# Indices may be on the CPU, and copies go between devices.
_MIXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.copy_.default, _aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor of `DEVICE`; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        wrapped.inner = inner
        return wrapped

    def tolist(self) -> Any:
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    here = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) and x.dim()]
    there = [x for x in flat if isinstance(x, Elsewhere)]
    if here and there and func not in _MIXED:
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"{func}: tensors of {shapes} are on the CPU, others on {DEVICE}")
    target = kwargs.get("device")
    out_there = _is_ours(target) if target is not None else bool(there)
    if func is _aten._local_scalar_dense.default:
        out_there = False
    plain_args, plain_kwargs = tree_unflatten(
        [x.inner if isinstance(x, Elsewhere) else x for x in flat], spec
    )
    if _is_ours(plain_kwargs.get("device")):
        plain_kwargs = {**plain_kwargs, "device": "cpu"}
    result = func(*plain_args, **plain_kwargs)
    # In-place and out= forms give back the very tensor they were given.
    known = {id(x.inner): x for x in there}
    if isinstance(result, torch.Tensor) and id(result) in known:
        return known[id(result)]
    if not out_there:
        return result
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, result)


@contextmanager
def other_device() -> Iterator[torch.device]:
    # Optimizers keep a list of the devices that have fused steps.
    fused = [*optimizer._get_fused_kernels_supported_devices(), DEVICE.type]
    # torch.tensor(..., device=...) then fills its tensor on the CPU and moves it, which a mode can see.
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", return_value=fused),
            # Inference tensors cannot be wrapped; without gradients the same operators run.
            mock.patch.object(Engine, "step", torch.no_grad()(Engine.step.__wrapped__)),
            _Mode(),
        ):
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
