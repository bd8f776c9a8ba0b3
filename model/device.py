"""Which device a model runs on, and the promise that goes with it."""

from __future__ import annotations

import os

import torch

from infra.errors import HeadwaterError


def pick_device(name: str = "auto") -> torch.device:
    """The device that `name` (auto, cpu or cuda) stands for.

    On a GPU it also asks for deterministic algorithms, because a run that is killed and resumed must end in
    the bits of one that was not; an operator that has none warns. Raises HeadwaterError when cuda is asked
    for and torch sees none.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise HeadwaterError(
            "device is cuda, but torch sees no CUDA device: install a CUDA build of torch (make env "
            "TORCH_INDEX=...), or set device=cpu"
        )
    if name == "cpu" or not there:
        return torch.device("cpu")
    # cuBLAS is deterministic only with a workspace of fixed size, which it reads before its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda", torch.cuda.current_device())
