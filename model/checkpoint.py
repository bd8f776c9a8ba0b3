"""A model on disk: `config.json` beside `model.safetensors`, named as in memory.

This is the form that stages hand to each other; the published Hugging Face layout is `model/hf.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.errors import HeadwaterError
from model.config import ModelConfig
from model.transformer import Transformer


class CheckpointError(HeadwaterError, ValueError):
    """Files and configuration that do not belong together; the message names the tensor."""


def save_model(model: Transformer, folder: Path) -> None:
    """Write weights and routing biases; bytes depend on the values alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load_model(
    folder: Path,
    precision: str = "fp32",
    config: ModelConfig | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """Read a model to `device`; `config` replaces the stored one where only its rotary extension differs.

    Raises CheckpointError naming what is missing, unexpected or of another shape.
    """
    try:
        stored = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
        tensors = load_file(folder / "model.safetensors", device=str(device))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a readable checkpoint ({error})") from error
    with torch.device("meta"):
        model = Transformer(config or stored, precision)
    check_shapes(
        folder,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )
    for name, tensor in tensors.items():
        check_finite(folder, name, tensor)
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def check_shapes(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    hint: str = "",
) -> None:
    """Raise CheckpointError naming the tensors that are missing, unexpected or of another shape."""
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    odd = [
        f"{name} has shape {found[name]}, the configuration makes it {expected[name]}"
        for name in sorted(set(expected) & set(found))
        if expected[name] != found[name]
    ]
    faults = [
        f"{word} {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for word, names in (
            ("missing tensors:", missing),
            ("unexpected tensors:", extra),
            ("misshaped:", odd),
        )
        if names
    ]
    if faults:
        raise CheckpointError(f"{folder}: {'; '.join(faults)}{hint}")


def check_finite(folder: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError when a tensor holds a NaN or an infinity."""
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{folder}: {name} holds values that are not finite")
