"""The choice of implementation, and life without Triton."""

import subprocess
import sys

import pytest
import torch

from kernels import backend

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
from kernels import check
from kernels.layers.linear import fp8_linear
x = torch.randn(5, 130, requires_grad=True)
fp8_linear(x, torch.randn(3, 130)).sum().backward()
assert x.grad.isfinite().all()
assert check.main([]) == 1
"""


def test_references_run_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TRITON], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "install triton" in done.stderr


def test_cpu_tensors_use_the_reference() -> None:
    assert not backend.runs_triton(torch.ones(1))


class _OnGpu:
    """What `runs_triton` reads of a tensor."""

    is_cuda = True
    device = torch.device("cuda", 0)


def test_a_gpu_without_fp8_is_an_error_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(backend, "triton", object())
    with pytest.raises(RuntimeError, match=r"A100.*\(8, 0\)"):
        backend.runs_triton(_OnGpu())
    assert backend.runs_triton(_OnGpu(), e4m3=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.runs_triton(_OnGpu())
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        backend.runs_triton(_OnGpu())
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(RuntimeError, match="ROCm"):
        backend.runs_triton(_OnGpu())
