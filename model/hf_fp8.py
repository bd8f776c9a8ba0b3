"""How a published folder stores weights: float32, bfloat16, or FP8 blocks as in the released checkpoints.

In FP8 a projection is E4M3 codes under its own name, and beside them `NAME_scale_inv`: an FP32 factor for
each block of 128 x 128 values, by which the codes are multiplied (released README_WEIGHTS; blocks at the
edges may be ragged). That is our own block quantisation of a weight (report section 3.3.2; see
`kernels.formats.quantize`).
What the report keeps in higher precision is not quantised: embedding, head, gates, norms, and the projection
that joins an MTP module's two inputs; these are bfloat16 there, and routing biases float32.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.formats.quantize import BLOCKS, Quantized, dequantize, quantize_blocks
from model.checkpoint import CheckpointError, check_finite

Weights = Literal["float32", "bfloat16", "fp8"]

SCALE = "_scale_inv"
"""Appended to the name of a quantised weight: the name of its factors."""

QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCKS),
}
"""`quantization_config` of the released `config.json`."""

_QUANTIZED = re.compile(r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$")
_READ = ("F32", "BF16", "F16")
_CODES = "F8_E4M3"


def check_weights(weights: str) -> None:
    """Raise CheckpointError unless `weights` is one of the three forms."""
    if weights not in get_args(Weights):
        raise CheckpointError(f"weights is {weights!r}: it must be one of {', '.join(get_args(Weights))}")


def stored_bytes(name: str, tensor: Tensor, weights: Weights) -> int:
    """Bytes that `stored` makes of a tensor."""
    if weights == "fp8" and _QUANTIZED.search(name):
        return tensor.numel() + 4 * math.prod(scale_shape(tuple(tensor.shape)))
    return tensor.numel() * _plain(name, weights).itemsize


def stored(folder: Path, name: str, tensor: Tensor, weights: Weights) -> dict[str, Tensor]:
    """The tensors that stand for a float32 tensor in a file, each with a storage of its own, on the CPU.

    Raises CheckpointError when a weight that is to be quantised is not finite.
    """
    tensor = tensor.detach()
    if weights == "fp8" and _QUANTIZED.search(name):
        check_finite(folder, name, tensor)
        made = quantize_blocks(tensor.float())
        return {name: made.codes.cpu(), name + SCALE: made.scales.cpu()}
    kept = tensor.to("cpu", _plain(name, weights), copy=True)
    return {name: kept.contiguous()}


def _plain(name: str, weights: Weights) -> torch.dtype:
    bias = name.endswith("e_score_correction_bias")
    return torch.float32 if weights == "float32" or bias else torch.bfloat16


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the factors of a weight of `shape`."""
    return tuple(-(-size // block) for size, block in zip(shape, BLOCKS, strict=True))


def is_codes(reader: Any, name: str) -> bool:
    """Whether a tensor of an open file is quantised."""
    return str(reader.get_slice(name).get_dtype()) == _CODES


def loaded(folder: Path, name: str, reader: Any, scales: Any) -> Tensor:
    """A tensor of an open file as float32; `scales` is the open file of its factors, None where it has none.

    Raises CheckpointError when it is of another type than float32, bfloat16, float16 and E4M3, or not finite.
    """
    kind = str(reader.get_slice(name).get_dtype())
    if kind in _READ:
        tensor = reader.get_tensor(name).float()
    elif kind == _CODES and scales is not None:
        factors = loaded(folder, name + SCALE, scales, None)
        tensor = dequantize(Quantized(reader.get_tensor(name), factors, BLOCKS))
    else:
        raise CheckpointError(
            f"{folder}: {name} is stored as {kind}; {', '.join(_READ)} are read, and a matrix as {_CODES} "
            "with its factors: convert it to one of them"
        )
    check_finite(folder, name, tensor)
    return tensor
