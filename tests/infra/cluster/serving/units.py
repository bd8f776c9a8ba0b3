"""Units that serve DeepSeek-V3, as they are published."""

from __future__ import annotations

from infra.cluster.serving.deployment import Deployment

PREFILL_REPORT = Deployment("prefill, EP32", gpus=32, tensor_parallel=4, slots_per_gpu=9)
"""Report §3.4.1: 4 nodes, 8 + 1 redundant experts a GPU."""

DECODE_REPORT = Deployment("decode, EP320", 320, tensor_parallel=4, slots_per_gpu=1, shared_as_routed=True)
"""Report §3.4.2: 40 nodes, one expert a GPU, 64 GPUs with redundant and shared ones."""

PREFILL_PRODUCTION = Deployment("prefill, EP32, DP32", gpus=32, tensor_parallel=1, slots_per_gpu=9)
DECODE_PRODUCTION = Deployment("decode, EP144, DP144", gpus=144, tensor_parallel=1, slots_per_gpu=2)
"""DeepSeek's overview of its inference system (2025): 18 nodes, 32 redundant experts."""
