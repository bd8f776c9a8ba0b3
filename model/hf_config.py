"""The published `config.json` of a `deepseek_v3` model, from and to our own configuration.

What the published form can say and this architecture cannot do (another gate, tied embeddings, another
quantisation) is an error when read, never a silent difference in the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointError
from model.config import ModelConfig
from model.hf_fp8 import QUANTIZATION, Weights

PUBLISHED_EPS = 1e-6
"""Of every RMSNorm: the published code has it as a constant in the norms of both latents."""

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_nextn_predict_layers",
    "rms_norm_eps",
    "initializer_range",
)
"""Fields that carry the same name and meaning on both sides."""

_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
}
"""What this architecture is. A file may leave these out (but for the first), it may not contradict them."""


def to_published(
    config: ModelConfig, bos_id: int, eos_id: int, weights: Weights = "float32"
) -> dict[str, Any]:
    """Contents of `config.json`.

    Raises CheckpointError naming a field that the published form has no place for. Not written for a model
    that was never extended: `beta_fast`, `beta_slow` and `mscale`, which then have no effect.
    """
    if config.rms_norm_eps != PUBLISHED_EPS:
        raise CheckpointError(
            f"model.rms_norm_eps is {config.rms_norm_eps}: published code fixes it at {PUBLISHED_EPS} in the "
            "norms of the latents, so the exported model would compute other logits; train with that value"
        )
    if not config.n_shared_experts:
        raise CheckpointError("model.n_shared_experts is 0: published deepseek_v3 models have at least one")
    values = {name: getattr(config, name) for name in _SAME}
    values |= _FIXED | ({"quantization_config": QUANTIZATION} if weights == "fp8" else {})
    if config.n_routed_experts == config.n_group:
        # Groups of one expert: published code takes the best two of each group and fails. The best groups are
        # then the best experts, which is what no grouping at all chooses.
        values |= {"n_group": 1, "topk_group": 1}
    return values | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "max_position_embeddings": config.max_position_embeddings,
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": _yarn(config),
        "rope_theta": config.rope_theta,
        "torch_dtype": "float32" if weights == "float32" else "bfloat16",
        "use_cache": True,
    }


def _yarn(config: ModelConfig) -> dict[str, Any] | None:
    if config.rope_factor == 1.0:
        return None
    return {
        "type": "yarn",
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
        "mscale": config.mscale,
        "mscale_all_dim": config.mscale,
    }


def from_published(values: dict[str, Any], where: Path) -> ModelConfig:
    """Inverse of `to_published`; also reads what transformers 5 writes (`rope_parameters`).

    `where` is the file, for messages. Raises CheckpointError naming a key that is missing or has a value this
    architecture cannot follow.
    """
    if values.get("model_type") != "deepseek_v3":
        raise CheckpointError(f"{where}: model_type is {values.get('model_type')!r}, not 'deepseek_v3'")
    for name, fixed in _FIXED.items():
        if values.get(name, fixed) != fixed:
            raise CheckpointError(f"{where}: {name} is {values[name]!r}, only {fixed!r} is supported")
    _check_quantization(values.get("quantization_config"), where)
    missing = [name for name in (*_SAME, "max_position_embeddings") if values.get(name) is None]
    if missing:
        raise CheckpointError(f"{where}: no value for {', '.join(missing)}")
    heads = values["num_attention_heads"]
    if values.get("num_key_value_heads", heads) != heads:
        raise CheckpointError(
            f"{where}: num_key_value_heads is {values['num_key_value_heads']}, only num_attention_heads, "
            f"{heads}, is supported"
        )
    if values["rms_norm_eps"] != PUBLISHED_EPS:
        raise CheckpointError(
            f"{where}: rms_norm_eps is {values['rms_norm_eps']}, only {PUBLISHED_EPS} is supported"
        )
    own = {name: values[name] for name in _SAME} | _rotary(values, where)
    try:
        return ModelConfig(**own)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_quantization(stated: Any, where: Path) -> None:
    """The released form alone; what else is said there does not change the values of weights."""
    for name in ("quant_method", "fmt", "weight_block_size") if stated else ():
        found = stated.get(name, QUANTIZATION[name]) if isinstance(stated, dict) else stated
        if found != QUANTIZATION[name]:
            raise CheckpointError(
                f"{where}: quantization_config.{name} is {found!r}, only {QUANTIZATION[name]!r} is "
                "supported: convert the weights to bfloat16 or float32 first"
            )


def _rotary(values: dict[str, Any], where: Path) -> dict[str, Any]:
    """Fields of ModelConfig that say how positions are turned."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    own = {
        "rope_theta": float(values.get("rope_theta", rope.get("rope_theta", 10000.0))),
        "original_max_position_embeddings": values["max_position_embeddings"],
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return own
    if kind != "yarn":
        raise CheckpointError(f"{where}: rope_scaling.type is {kind!r}, only 'yarn' is supported")
    needed = (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    )
    missing = [name for name in needed if rope.get(name) is None]
    if missing:
        raise CheckpointError(f"{where}: rope_scaling has no value for {', '.join(missing)}")
    if rope["mscale"] != rope["mscale_all_dim"]:
        raise CheckpointError(
            f"{where}: rope_scaling.mscale is {rope['mscale']} and mscale_all_dim {rope['mscale_all_dim']}: "
            "only equal ones are supported, as published"
        )
    for name, plain in (("attention_factor", None), ("truncate", True)):
        if rope.get(name, plain) != plain:
            raise CheckpointError(
                f"{where}: rope_scaling.{name} is {rope[name]!r}, only {plain!r} is supported"
            )
    return own | {
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "rope_factor": float(rope["factor"]),
        "beta_fast": float(rope["beta_fast"]),
        "beta_slow": float(rope["beta_slow"]),
        "mscale": float(rope["mscale"]),
    }
