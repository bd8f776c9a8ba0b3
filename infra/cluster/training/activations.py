"""What a layer keeps of a token for its backward pass: bytes by tensor, as `model/` keeps them on a GPU.

Under `fp8` linear layers keep their inputs in 1x128 tiles, SwiGLU networks the inputs of the activation too,
and the output of attention waits in E5M6 beside the BF16 copy that attention itself keeps (report §3.3.3,
kernels/README.md). Under `bf16` and `fp32` everything has the type of the residual stream. Hidden values of
routed experts are recomputed under every precision. Tests compare the sums with what torch allocates.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from infra.cluster.shape import ModelShape

STATISTIC = 4
"""Bytes of an FP32 number a row: the inverse root mean square of a norm, a log-sum-exp, a routing weight."""
INDEX = 8
"""Bytes of an int64."""


def tiles(values: int) -> float:
    """Bytes of a row in E4M3 tiles: a code a value, an FP32 scale for 128."""
    return values + 4 * math.ceil(values / 128)


def e5m6(values: int) -> float:
    """Bytes of a row in E5M6: 12 bits a value, an FP32 scale for 128."""
    return 1.5 * values + 4 * math.ceil(values / 128)


def value_bytes(precision: str) -> int:
    """Bytes of a value of the residual stream."""
    return 4 if precision == "fp32" else 2


def layer_kept(
    shape: ModelShape, layer: int, precision: str, recompute: Collection[str], load: float = 1.0
) -> dict[str, float]:
    """Bytes a token that one layer keeps from its forward to its backward pass, by tensor.

    `recompute` holds some of `RECOMPUTED` in `layout.py`; `load` is the rows that this GPU's experts get over
    those of the mean GPU.
    """
    if "full" in recompute:
        return {"layer input": value_bytes(precision) * shape.hidden_size}
    kept = _attention(shape, precision, recompute)
    if layer < shape.first_k_dense_replace:
        return kept | _dense(shape, precision, recompute)
    return kept | _experts(shape, precision, recompute, load * shape.num_experts_per_tok)


def mtp_kept(
    shape: ModelShape, depth: int, precision: str, recompute: Collection[str], load: float = 1.0
) -> dict[str, float]:
    """Bytes a token that an MTP module keeps, its pass through the head included."""
    hidden, wide = shape.hidden_size, value_bytes(precision)
    joined = tiles(2 * hidden) if precision == "fp8" else wide * 2 * hidden
    return (
        {"next embedding": wide * hidden + STATISTIC, "state before": STATISTIC, "joined": joined}
        | layer_kept(shape, shape.num_hidden_layers + depth, precision, recompute, load)
        | head_kept(shape, precision)
    )


def head_kept(shape: ModelShape, precision: str) -> dict[str, float]:
    """Bytes a token that the final norm and the loss keep: their input, and the gradient of the states, which
    is made in the forward pass. The gradient of the head is not of a token: see `memory.py`."""
    row = value_bytes(precision) * shape.hidden_size
    return {"final state": row + STATISTIC, "gradient of the states": row, "counted positions": 2 * INDEX}


def _attention(shape: ModelShape, precision: str, recompute: Collection[str]) -> dict[str, float]:
    s, fp8, wide = shape, precision == "fp8", value_bytes(precision)
    heads, latent = s.num_attention_heads, s.kv_lora_rank
    value = heads * s.v_head_dim
    kept: dict[str, float] = {
        "layer input": wide * s.hidden_size + STATISTIC,
        "query latent": wide * s.q_lora_rank + STATISTIC,
        "key-value latent": wide * (latent + s.qk_rope_head_dim) + STATISTIC,
        "rotary key": wide * s.qk_rope_head_dim,
        "attention statistics": STATISTIC * heads,
    }
    if fp8:
        kept["attention input"] = tiles(s.hidden_size)
        kept["normed latents"] = tiles(s.q_lora_rank) + tiles(latent)
        kept["output projection's input"] = e5m6(value)
    elif "norms" not in recompute:
        kept["attention input"] = wide * s.hidden_size
        kept["normed latents"] = wide * s.q_lora_rank
    if not fp8 or "attention_output" not in recompute:
        kept["attention output"] = wide * value
    if "mla_up" not in recompute:
        kept["queries"] = wide * heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
        kept["keys and values"] = wide * heads * (s.qk_nope_head_dim + s.v_head_dim)
    # Keys and values are made again from the normed latent, which then has to be there.
    if "mla_up" in recompute or not (fp8 or "norms" in recompute):
        kept["normed key-value latent"] = wide * latent
    return kept


def _dense(shape: ModelShape, precision: str, recompute: Collection[str]) -> dict[str, float]:
    hidden, wide = shape.hidden_size, value_bytes(precision)
    kept: dict[str, float] = {"residual": wide * hidden + STATISTIC}
    if precision == "fp8":
        kept["dense input"] = tiles(hidden)
    elif "norms" not in recompute:
        kept["dense input"] = wide * hidden
    return kept | _network("dense", shape.intermediate_size, precision, recompute)


def _experts(shape: ModelShape, precision: str, recompute: Collection[str], rows: float) -> dict[str, float]:
    s, hidden, fp8, wide = shape, shape.hidden_size, precision == "fp8", value_bytes(precision)
    kept: dict[str, float] = {
        "residual": wide * hidden + STATISTIC,
        # All affinities and two sums of them; the chosen with their weights; where their rows lie.
        "routing": STATISTIC * (s.n_routed_experts + 2)
        + (2 * STATISTIC + INDEX) * s.num_experts_per_tok
        + (2 * INDEX + (STATISTIC if fp8 else wide)) * rows,
    }
    if precision != "fp32" and "router" not in recompute:
        kept["router input"] = 4 * hidden
    if fp8:
        kept["tokens sent"] = tiles(hidden)
        kept["rows of experts"] = rows * tiles(hidden)
        kept["experts' SwiGLU inputs"] = rows * tiles(2 * s.moe_intermediate_size)
    else:
        if "norms" not in recompute:
            kept["tokens sent"] = wide * hidden
        kept["rows of experts"] = rows * wide * hidden
        kept["experts' SwiGLU inputs"] = rows * wide * 2 * s.moe_intermediate_size
        # Torch's sum of rows into tokens keeps what it sums.
        kept["experts' outputs"] = rows * wide * hidden
    if s.n_shared_experts:
        kept |= _network("shared", s.n_shared_experts * s.moe_intermediate_size, precision, recompute)
    return kept


def _network(name: str, width: int, precision: str, recompute: Collection[str]) -> dict[str, float]:
    """A SwiGLU network of all tokens, behind its input."""
    if precision == "fp8":
        return {f"{name} SwiGLU inputs": tiles(2 * width)}
    wide = value_bytes(precision)
    kept: dict[str, float] = {f"{name} SwiGLU inputs": wide * 2 * width}
    if "swiglu" not in recompute:
        kept[f"{name} SwiGLU outputs"] = wide * width
    return kept
