"""Which implementation a public function runs: Triton on a CUDA device, the PyTorch reference elsewhere.

Triton is optional. A machine without it still imports every file of this folder and runs the references;
`jit` then leaves the kernel an ordinary function that nobody calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations, and platforms without Triton
    triton = None
    tl = None
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:
    gluon = gl = hopper = None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit` where Triton is installed, else the function unchanged; with `options` a decorator."""
    return _compiled_by(triton, function, options)


def gluon_jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """The same with `gluon.jit`: Gluon is Triton's language in which layouts and barriers are spelled out."""
    return _compiled_by(gluon, function, options)


def _compiled_by(compiler: Any, function: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    if function is None:
        return lambda kernel: _compiled_by(compiler, kernel, options)
    if compiler is None:
        return function
    return compiler.jit(**options)(function) if options else compiler.jit(function)


def runs_triton(tensor: torch.Tensor, *, e4m3: bool = True) -> bool:
    """Whether kernels over `tensor` run in Triton (CUDA tensors) or as the PyTorch reference (all others).

    Kernels without FP8 say so (`e4m3=False`) and run on every NVIDIA GPU that Triton knows.

    Raises:
        RuntimeError: the tensor is on a GPU whose kernels cannot run: no Triton, no E4M3 hardware (NVIDIA
            compute capability below 8.9) where it is needed, or a ROCm device. A silent fallback there
            would be slow and would go unnoticed.
    """
    if not tensor.is_cuda:
        return False
    if torch.version.hip is not None:
        raise RuntimeError("kernels: ROCm devices are not supported; move the tensors to the CPU")
    if triton is None:
        raise RuntimeError(
            "kernels: the tensor is on a GPU and Triton is not installed; "
            "install triton>=3.6 or move the tensors to the CPU"
        )
    capability = torch.cuda.get_device_capability(tensor.device)
    if e4m3 and capability < (8, 9):
        raise RuntimeError(
            f"FP8 kernels: {torch.cuda.get_device_name(tensor.device)} has compute capability {capability}, "
            "and E4M3 needs (8, 9); use precision bf16, or move the tensors to the CPU"
        )
    return True
