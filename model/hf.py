"""A model as a Hugging Face `deepseek_v3` folder, and back.

The folder has the layout of the released checkpoints, so that transformers and the serving engines that read
those read ours: one matrix a projection, three matrices an expert, the MTP modules as layers after the last
(released README_WEIGHTS), with their own copies of the embedding and the head that they share.

Where the MTP weights go: transformers' DeepseekV3ForCausalLM has no MTP, and skips layer 61 by its number. In
a model of any other depth it would report ours as unexpected at every load. So they are part of the main set
only in a model of 61 layers; otherwise they are in `mtp.safetensors` beside it, under the same names, which
transformers does not open and engines that read every safetensors file find.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import CheckpointError, check_shapes
from model.config import ModelConfig
from model.hf_config import from_published, to_published
from model.hf_fp8 import SCALE, Weights, check_weights, is_codes, loaded, scale_shape, stored, stored_bytes
from model.transformer import Transformer

_INDEX = "model.safetensors.index.json"
_RELEASED_LAYERS = 61
_SHARD_BYTES = 5 * 10**9

_RENAMED = {
    "self_attn.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "norm.weight": "shared_head.norm.weight",  # of an MTP module
}


def write_hf(
    model: Transformer,
    folder: Path,
    tokenizer_json: Path,
    tokenizer_config: dict[str, Any],
    max_shard_bytes: int = _SHARD_BYTES,
    weights: Weights = "float32",
) -> None:
    """Write weights, configuration and tokenizer; bytes depend on the arguments alone.

    `tokenizer_json` is copied. `tokenizer_config` becomes `tokenizer_config.json`; its `bos_token`,
    `eos_token` and `pad_token` are looked up in the tokenizer for the configuration's ids. The tensors of a
    weight file take no more than `max_shard_bytes`, unless one alone does. `weights`: how they are stored,
    see `model.hf_fp8`; only float32 comes back bit for bit.

    Raises CheckpointError when the configuration has no published form, a token is not in the tokenizer,
    `max_shard_bytes` is not positive, or a weight that is to be quantised is not finite.
    """
    ids = _token_ids(tokenizer_json, tokenizer_config)
    write_weights(model, folder, ids["bos_token_id"], ids["eos_token_id"], max_shard_bytes, weights)
    _write_json(folder / "generation_config.json", ids)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    shutil.copyfile(tokenizer_json, folder / "tokenizer.json")


def write_weights(
    model: Transformer,
    folder: Path,
    bos_id: int,
    eos_id: int,
    max_shard_bytes: int = _SHARD_BYTES,
    weights: Weights = "float32",
) -> None:
    """Write weights and configuration alone; see `write_hf`."""
    check_weights(weights)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}: it must be positive")
    config = to_published(model.config, bos_id, eos_id, weights)
    folder.mkdir(parents=True, exist_ok=True)
    # Files of an earlier export with other shards would be read together with these.
    for pattern in ("model*.safetensors", "mtp*.safetensors", _INDEX):
        for old in folder.glob(pattern):
            old.unlink()
    _write_json(folder / "config.json", config)
    main, ahead = list(_main_tensors(model)), list(_mtp_tensors(model))
    if model.config.num_hidden_layers == _RELEASED_LAYERS:
        main, ahead = main + ahead, []
    placed = _write_shards(folder, "model", main, max_shard_bytes, weights)
    if len(set(placed.values())) > 1:
        total = sum(stored_bytes(name, tensor, weights) for name, tensor in main)
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    if ahead:
        _write_shards(folder, "mtp", ahead, max_shard_bytes, weights)


def read_hf(folder: Path) -> Transformer:
    """Read a folder in the published layout, in float32, bfloat16, float16 or FP8 blocks; weights become
    float32.

    Raises CheckpointError naming a file that cannot be read, a configuration key that does not fit, or the
    tensors that are missing, unexpected, misshaped, of another type or not finite.
    """
    config = from_published(_read_json(folder / "config.json"), folder / "config.json")
    model = Transformer(config)
    expected = dict(_main_tensors(model)) | dict(_mtp_tensors(model))
    copies = dict(_shared_copies(model))
    readers = {path: _open(path) for path in _weight_files(folder)}
    where = {name: reader for reader in readers.values() for name in reader.keys()}  # noqa: SIM118 - not a dict
    found = {name: tuple(reader.get_slice(name).get_shape()) for name, reader in where.items()}
    # A folder may leave out the copies of what MTP modules share with the main model.
    wanted = {name: tuple(t.shape) for name, t in expected.items() if name in found or name not in copies}
    ahead = any(name not in found for name in wanted if _is_ahead(name, config))
    hint = "; to read the model without its MTP modules, set num_nextn_predict_layers to 0 in config.json"
    scales = {
        name + SCALE: scale_shape(shape)
        for name, shape in wanted.items()
        if name in found and len(shape) == 2 and is_codes(where[name], name)
    }
    check_shapes(folder, wanted | scales, found, hint if ahead else "")
    # The views alias the model's memory, so one tensor of the files is held at a time. Copies of shared
    # tensors come after their originals.
    for name in sorted(wanted, key=lambda name: name in copies):
        tensor = loaded(folder, name, where[name], where.get(name + SCALE))
        if name not in copies:
            expected[name].copy_(tensor)
        elif not torch.equal(expected[name], tensor):
            raise CheckpointError(
                f"{folder}: {name} differs from the main model's, which MTP modules share here"
            )
    return model


def _is_ahead(name: str, config: ModelConfig) -> bool:
    """Whether a published name belongs to an MTP module."""
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and int(parts[2]) >= config.num_hidden_layers


def _main_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Published names and views of the model's own memory, main model."""
    yield "model.embed_tokens.weight", model.embed_tokens.detach()
    for layer, block in enumerate(model.layers):
        for name, tensor in block.state_dict().items():
            yield from _published(f"model.layers.{layer}.", name, tensor)
    yield "model.norm.weight", model.norm.weight.detach()
    yield "lm_head.weight", model.lm_head.detach()


def _mtp_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The same of the MTP modules, with the copies of what they share."""
    for depth, module in enumerate(model.mtp):
        prefix = f"model.layers.{model.config.num_hidden_layers + depth}."
        for name, tensor in module.state_dict().items():
            yield from _published(prefix, _RENAMED.get(name, name.removeprefix("block.")), tensor)
    yield from _shared_copies(model)


def _shared_copies(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    for depth in range(len(model.mtp)):
        prefix = f"model.layers.{model.config.num_hidden_layers + depth}."
        yield f"{prefix}embed_tokens.weight", model.embed_tokens.detach()
        yield f"{prefix}shared_head.head.weight", model.lm_head.detach()


def _published(prefix: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One of our tensors as the published ones that it holds."""
    name = _RENAMED.get(name, name)
    parent, _, leaf = name.rpartition(".")
    if leaf in ("weight", "e_score_correction_bias"):
        yield prefix + name, tensor
    elif parent == "mlp.experts":
        for expert, matrix in enumerate(tensor):
            yield from _published(prefix, f"mlp.experts.{expert}.{leaf}", matrix)
    elif leaf == "gate_up_proj":
        gate, up = tensor.chunk(2)
        yield f"{prefix}{parent}.gate_proj.weight", gate
        yield f"{prefix}{parent}.up_proj.weight", up
    else:
        yield f"{prefix}{name}.weight", tensor


def _write_shards(
    folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], max_bytes: int, weights: Weights
) -> dict[str, str]:
    """Write tensors in order into as few files as fit; returns which file each went to."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    room = max_bytes
    for name, tensor in tensors:
        size = stored_bytes(name, tensor, weights)
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append((name, tensor))
        room -= size
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{several}.safetensors"
        # Copies, because the format wants a storage of its own for each; one file's worth at a time.
        own: dict[str, Tensor] = {}
        for name, tensor in shard:
            own |= stored(folder, name, tensor, weights)
        save_file(own, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(own, file)
    return placed


def _weight_files(folder: Path) -> list[Path]:
    """Files of the main set, from the index where there is one, and those of MTP weights beside it."""
    index = folder / _INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map does not map tensors to files")
        main = {folder / file for file in weight_map.values()}
    else:
        main = {folder / "model.safetensors"}
    return sorted(main | set(folder.glob("mtp*.safetensors")))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable weight file ({error})") from error


def _token_ids(tokenizer_json: Path, tokenizer_config: dict[str, Any]) -> dict[str, int]:
    """Ids of the begin, end and (where there is one) padding tokens; contents of `generation_config.json`."""
    added = {entry["content"]: entry["id"] for entry in _read_json(tokenizer_json).get("added_tokens", [])}
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        token = tokenizer_config.get(f"{role}_token")
        if token in added:
            ids[f"{role}_token_id"] = added[token]
        elif role != "pad" or token is not None:
            raise CheckpointError(
                f"{tokenizer_json}: {role}_token of the tokenizer configuration is {token!r}, which is no "
                "added token there"
            )
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
