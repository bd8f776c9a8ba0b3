"""Shapes of the published DeepSeek-V3, as a table: this folder imports no model.

tests/kernels/test_bench_shapes.py compares it with the model's configuration.
"""

from __future__ import annotations

from kernels.bench.entry import Shape

TOKENS = (4096, 8192)
HIDDEN = 7168
VOCABULARY = 129280
DENSE_WIDTH, EXPERT_WIDTH = 18432, 2048  # of the feed-forward networks: F, where SwiGLU reads 2F
ROUTED_EXPERTS, EXPERTS_PER_TOKEN = 256, 8
HEADS, QK_WIDTH, V_WIDTH, LATENT, ROTARY = 128, 192, 128, 512, 64
LENGTH = 4096

# Weights [out, in] of the linear layers, and of one routed expert.
DENSE = {
    "q_a_proj": (1536, 7168),
    "q_b_proj": (24576, 1536),
    "kv_a_proj": (576, 7168),
    "kv_b_proj": (32768, 512),
    "o_proj": (7168, 16384),
    "dense gate_up": (36864, 7168),
    "dense down": (7168, 18432),
    "shared gate_up": (4096, 7168),
    "shared down": (7168, 2048),
}
ROUTED = {"experts gate_up": (4096, 7168), "experts down": (7168, 2048)}
EXPERTS = (4, 8)  # on one rank: the report trains with 4

FPROP = [Shape(name, (m, n, k)) for m in TOKENS for name, (n, k) in DENSE.items()]
DGRAD = [Shape(name, (m, k, n)) for m in TOKENS for name, (n, k) in DENSE.items()]
WGRAD = [Shape(name, (n, k, m)) for m in TOKENS for name, (n, k) in DENSE.items()]

# Grouped: all tokens of a rank, N, K, experts. TOKENS is the mean of an expert.
_RANKS = [(m * experts, experts) for experts in EXPERTS for m in TOKENS]
GROUPED_FPROP = [Shape(name, (t, n, k, e)) for t, e in _RANKS for name, (n, k) in ROUTED.items()]
GROUPED_DGRAD = [Shape(name, (t, k, n, e)) for t, e in _RANKS for name, (n, k) in ROUTED.items()]
GROUPED_WGRAD = [Shape(name, (t, n, k, e)) for t, e in _RANKS for name, (n, k) in ROUTED.items()]


def uneven(tokens: int, experts: int) -> list[int]:
    """Offsets [experts + 1] that split the tokens in the ratio 1 : 2 : 3 ..., the largest part first."""
    whole = experts * (experts + 1) // 2
    ends = [tokens * sum(range(experts - e, experts + 1)) // whole for e in range(experts)]
    return [0, *ends]
