"""The kernels of a layer on one GPU: their operations, the bytes they move, and which of the two binds.

Linear layers run in FP8 (1 byte a weight), the absorbed products of MLA, attention and the output head in
BF16 (2 bytes), as the report trains and serves them (§3.3, §3.4). On a GPU without FP8 all of it is BF16.
Element-wise kernels are left out: they are fused with their neighbours, or small beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.cluster.machines import Machine
from infra.cluster.serving.deployment import Deployment
from infra.cluster.shape import ModelShape

FP8 = 1.0
BF16 = 2.0


def linear_bytes(machine: Machine) -> float:
    """Bytes of a value of the linear layers: 1 in FP8, 2 on a GPU without it."""
    return FP8 if machine.fp8 else BF16


@dataclass(frozen=True)
class Kernel:
    """One kernel of one layer."""

    name: str
    part: str
    """`attention`, `dense`, `experts` or `head`."""
    operations: float
    """Two for a multiply-add."""
    bytes: float
    products: float
    """Operations a second that such a kernel reaches."""
    memory: float
    """Bytes a second that a kernel reaches."""
    layers: int
    """How often a step runs it."""

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    @property
    def ridge(self) -> float:
        """The intensity above which products bind."""
        return self.products / self.memory

    @property
    def bound(self) -> str:
        """`memory` or `products`."""
        return "products" if self.intensity > self.ridge else "memory"

    @property
    def seconds(self) -> float:
        """Of one layer: whichever of products and memory takes longer; the other hides behind it."""
        return max(self.operations / self.products, self.bytes / self.memory)


@dataclass(frozen=True)
class Gpu:
    """Builds the kernels of one GPU of a deployment."""

    shape: ModelShape
    machine: Machine
    deployment: Deployment
    lent: float = 0.0
    """Share of the multiprocessors that communication holds meanwhile."""
    imbalance: float = 1.0
    """Tokens of the busiest GPU at the experts, over the mean: what a placement leaves (`placement`)."""

    @property
    def heads(self) -> float:
        """Attention heads on this GPU."""
        return self.shape.num_attention_heads / self.deployment.tensor_parallel

    @property
    def linear(self) -> float:
        """Bytes of a value of the linear layers."""
        return linear_bytes(self.machine)

    def matmul(
        self,
        name: str,
        part: str,
        tokens: float,
        inner: int,
        outer: int,
        layers: int,
        *,
        matrices: float = 1.0,
        element: float | None = None,
    ) -> Kernel:
        """`tokens` rows, each through `matrices` matrices [inner, outer]; every matrix is read once.

        `element` is the bytes of a value, those of linear layers where nothing is said.
        """
        rates = self.machine.rates
        element = self.linear if element is None else element
        peak = self.machine.fp8 * rates.gemm if element == FP8 else self.machine.bf16 * rates.plain
        moved = matrices * (inner * outer * element + tokens * (inner * element + outer * BF16))
        return self._kernel(name, part, 2.0 * tokens * matrices * inner * outer, moved, peak, layers)

    def decode_attention(self, requests: float, queries: int, context: float, layers: int) -> list[Kernel]:
        """MLA in the absorbed form over the latent cache; `requests` and their `queries` are this GPU's own.

        The down-projections see the GPU's own tokens; the rest sees its group's tokens with its own heads.
        The cache of a request is read once for all its queries and heads.
        """
        s = self.shape
        own, group = requests * queries, requests * queries * self.deployment.tensor_parallel
        latent = s.kv_lora_rank + s.qk_rope_head_dim
        group_requests = requests * self.deployment.tensor_parallel
        scores = 2.0 * group * self.heads * context * (latent + s.kv_lora_rank)
        read = group_requests * context * latent * BF16
        read += group * self.heads * (latent + s.kv_lora_rank) * BF16
        rate = self.machine.bf16 * self.machine.rates.attention
        return [
            self._down(own, layers),
            self._query_up(group, layers),
            self.matmul(
                "absorb W_UK",
                "attention",
                group,
                s.qk_nope_head_dim,
                s.kv_lora_rank,
                layers,
                matrices=self.heads,
                element=BF16,
            ),
            self._kernel("attention over the cache", "attention", scores, read, rate, layers),
            self.matmul(
                "absorb W_UV",
                "attention",
                group,
                s.kv_lora_rank,
                s.v_head_dim,
                layers,
                matrices=self.heads,
                element=BF16,
            ),
            self._output(group, layers),
        ]

    def prefill_attention(self, tokens: float, visible: float, layers: int) -> list[Kernel]:
        """MLA with keys and values built; each token sees `visible` tokens on average (half a prompt)."""
        s = self.shape
        group = tokens * self.deployment.tensor_parallel
        width = s.qk_nope_head_dim + s.qk_rope_head_dim + s.v_head_dim
        scores = 2.0 * group * self.heads * visible * width
        # Queries and outputs, keys and values: each once, since a block of queries reads them from cache.
        read = 2.0 * group * self.heads * width * BF16
        rate = self.machine.bf16 * self.machine.rates.attention
        built = round(self.heads * (s.qk_nope_head_dim + s.v_head_dim))
        return [
            self._down(tokens, layers),
            self._query_up(group, layers),
            self.matmul("W_UK, W_UV", "attention", group, s.kv_lora_rank, built, layers),
            self._kernel("causal attention", "attention", scores, read, rate, layers),
            self._output(group, layers),
        ]

    def dense(self, tokens: float, layers: int) -> list[Kernel]:
        """The dense feed-forward network, whole on each GPU (TP1, report §3.4.1)."""
        return self._mlp("dense", "dense", tokens, self.shape.intermediate_size, layers)

    def experts(self, tokens: float, layers: int) -> list[Kernel]:
        """The gate, the routed experts that are hit, the shared one where it is on the GPU itself."""
        s = self.shape
        received = tokens * self.deployment.copies(s) * self.imbalance
        read = self.deployment.slots_read(s, tokens)
        weights = 3.0 * s.hidden_size * s.moe_intermediate_size
        # In FP8, gate and up out in BF16, their product in FP8, out in BF16.
        row = s.hidden_size * (self.linear + BF16) + s.moe_intermediate_size * (2 * BF16 + self.linear)
        rates = self.machine.rates
        low = self.linear == FP8
        rate = self.machine.fp8 * rates.grouped if low else self.machine.bf16 * rates.plain
        found = [
            self.matmul("gate", "experts", tokens, s.hidden_size, s.n_routed_experts, layers, element=BF16),
            self._kernel(
                "routed experts",
                "experts",
                2.0 * received * weights,
                read * weights * self.linear + received * row,
                rate,
                layers,
            ),
        ]
        if s.n_shared_experts and not self.deployment.shared_as_routed:
            width = s.n_shared_experts * s.moe_intermediate_size
            found += self._mlp("shared expert", "experts", tokens, width, layers)
        return found

    def head(self, tokens: float) -> list[Kernel]:
        """The output head, its vocabulary split over the attention group."""
        rows = round(self.shape.vocab_size / self.deployment.tensor_parallel)
        group = tokens * self.deployment.tensor_parallel
        return [self.matmul("output head", "head", group, self.shape.hidden_size, rows, 1, element=BF16)]

    def _down(self, tokens: float, layers: int) -> Kernel:
        s = self.shape
        width = s.q_lora_rank + s.kv_lora_rank + s.qk_rope_head_dim
        return self.matmul("W_DQ, W_DKV, W_KR", "attention", tokens, s.hidden_size, width, layers)

    def _query_up(self, tokens: float, layers: int) -> Kernel:
        s = self.shape
        width = round(self.heads * (s.qk_nope_head_dim + s.qk_rope_head_dim))
        return self.matmul("W_UQ, W_QR", "attention", tokens, s.q_lora_rank, width, layers)

    def _output(self, tokens: float, layers: int) -> Kernel:
        inner = round(self.heads * self.shape.v_head_dim)
        return self.matmul("W_O", "attention", tokens, inner, self.shape.hidden_size, layers)

    def _mlp(self, name: str, part: str, tokens: float, width: int, layers: int) -> list[Kernel]:
        hidden = self.shape.hidden_size
        return [
            self.matmul(f"{name}, gate and up", part, tokens, hidden, 2 * width, layers),
            self.matmul(f"{name}, down", part, tokens, width, hidden, layers),
        ]

    def _kernel(
        self, name: str, part: str, operations: float, moved: float, rate: float, layers: int
    ) -> Kernel:
        # Multiprocessors lent to communication are lost to products; the rest still draw the full bandwidth.
        memory = self.machine.memory_bandwidth * self.machine.rates.stream
        return Kernel(name, part, operations, moved, rate * (1.0 - self.lent), memory, layers)
