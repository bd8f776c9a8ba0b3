"""A model on disk: `config.json` beside `model.safetensors`, named as in memory.

This is the form that stages hand to each other; the published Hugging Face layout is `model/hf.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.transformer import Transformer


class CheckpointError(ValueError):
    """Files and configuration that do not belong together; the message names the tensor."""


def save_model(model: Transformer, folder: Path) -> None:
    """Write weights and routing biases; bytes depend on the values alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load_model(folder: Path, precision: str = "fp32", config: ModelConfig | None = None) -> Transformer:
    """Read a model; `config` replaces the stored one where only its rotary extension differs.

    Raises CheckpointError naming what is missing, unexpected or of another shape.
    """
    try:
        stored = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: not a readable checkpoint ({error})") from error
    with torch.device("meta"):
        model = Transformer(config or stored, precision)
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise CheckpointError(f"{folder}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the configuration makes it "
                f"{tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {name} holds values that are not finite")
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
