"""The architecture of a Headwater model: every size and constant that the weights depend on.

A standard-library dataclass, so that a bare GPU image needs nothing more to build a model, and so that stage
configurations, the command line and Prefect forms can nest the same class. Field names follow the published
`config.json` of DeepSeek-V3; the defaults are that model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from infra.errors import HeadwaterError


class ModelConfigError(HeadwaterError, ValueError):
    """A size that does not fit the others; the message names the field and the nearest value that fits."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model (report §4.2, published config.json).

    The report trains with `initializer_range` 0.006 although the published file carries 0.02; the default
    follows the report.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    """Leading layers whose feed-forward network is dense."""
    intermediate_size: int = 18432
    """Width of a dense feed-forward network."""
    moe_intermediate_size: int = 2048
    """Width of one expert."""
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    """Expert groups (nodes); a token reaches at most `topk_group` of them (§2.1.2, node-limited routing)."""
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    num_nextn_predict_layers: int = 1
    """Depth D of multi-token prediction (§2.2)."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    rope_theta: float = 10000.0
    original_max_position_embeddings: int = 4096
    """Context length of pretraining, in tokens."""
    rope_factor: float = 1.0
    """YaRN extension factor s; 1 means that the model was not extended (§4.3)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            zero_allowed = f.name in ("num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts")
            kind, word = (int, "a whole number") if f.type == "int" else ((int, float), "a number")
            if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
                raise ModelConfigError(f"model.{f.name} is {value!r}: it must be {word}")
            if value < 0 or (value == 0 and not zero_allowed):
                raise ModelConfigError(f"model.{f.name} is {value}: it must be positive")
        if self.qk_rope_head_dim % 2:
            raise ModelConfigError(
                f"model.qk_rope_head_dim is {self.qk_rope_head_dim}: RoPE turns pairs, so it must be even; "
                f"{self.qk_rope_head_dim + 1} fits"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ModelConfigError(
                f"model.first_k_dense_replace is {self.first_k_dense_replace}, more than the "
                f"{self.num_hidden_layers} layers there are"
            )
        if self.n_routed_experts % self.n_group:
            raise ModelConfigError(
                f"model.n_routed_experts ({self.n_routed_experts}) does not divide into model.n_group "
                f"({self.n_group}) equal groups"
            )
        if self.topk_group > self.n_group:
            raise ModelConfigError(
                f"model.topk_group ({self.topk_group}) exceeds model.n_group ({self.n_group})"
            )
        reachable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            raise ModelConfigError(
                f"model.num_experts_per_tok is {self.num_experts_per_tok}, but node-limited routing "
                f"leaves only {reachable} experts to choose from: raise topk_group or lower it"
            )
        if self.beta_fast <= self.beta_slow:
            raise ModelConfigError(
                f"model.beta_fast ({self.beta_fast}) must exceed model.beta_slow ({self.beta_slow})"
            )
        if self.rope_factor < 1.0:
            raise ModelConfigError(
                f"model.rope_factor is {self.rope_factor}: YaRN extends, so it must be >= 1"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the content part and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def max_position_embeddings(self) -> int:
        """Longest context in tokens, extension included."""
        return int(self.original_max_position_embeddings * self.rope_factor)

    @property
    def latent_dim(self) -> int:
        """Values cached for a token and layer: the KV latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether the given layer (0-based; MTP layers follow the main ones) has experts."""
        return layer >= self.first_k_dense_replace

    def extended(self, factor: float) -> ModelConfig:
        """The same model with its context extended `factor` times from its original length."""
        return replace(self, rope_factor=factor)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; an unknown or missing key raises ModelConfigError naming it."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ModelConfigError(f"unknown model configuration field(s): {', '.join(unknown)}")
        missing = sorted({f.name for f in fields(cls)} - set(values))
        if missing:
            raise ModelConfigError(f"no value for model configuration field(s): {', '.join(missing)}")
        return cls(**values)
