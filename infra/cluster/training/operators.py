"""What one micro-batch makes a GPU do in each part of the model, forward and back: operations and bytes.

A training step is a list of these operators. Products are counted by their shapes; everything between them by
the bytes that it must read and write once. Times follow from a `Machine` alone. Unless told otherwise experts
are loaded evenly: a GPU of an expert-parallel group computes as many rows as its own tokens send out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from infra.cluster.counts.weights import Part, Weight, layer_weights
from infra.cluster.machines import Machine
from infra.cluster.shape import ModelShape
from infra.cluster.training.layout import REPORT_RECOMPUTES


@dataclass(frozen=True)
class Operator:
    """One kernel, or one kind of kernels of a layer."""

    name: str
    rate: str
    """The field of `Rates` that says what such kernels reach."""
    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, machine: Machine, precision: str, sms: int | None = None) -> float:
        """Time on `sms` of the machine's multiprocessors (all by default). Memory bandwidth is shared."""
        if self.rate == "memory":
            return self.bytes / (machine.memory_bandwidth * machine.rates.memory)
        share = (sms or machine.multiprocessors) / machine.multiprocessors
        low = "bf16" if precision == "fp8" else precision
        if self.rate in ("gemm", "grouped", "wgrad"):
            rate = getattr(machine.rates, self.rate if precision == "fp8" else "plain")
            return self.flops / (machine.peak(precision) * rate * share)
        return self.flops / (machine.peak(low) * getattr(machine.rates, self.rate) * share)


@dataclass(frozen=True)
class Work:
    """Operators of one micro-batch in a part of the model: forward, backward for inputs and for weights."""

    forward: tuple[Operator, ...] = ()
    inputs: tuple[Operator, ...] = ()
    weights: tuple[Operator, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights)


def seconds(operators: Iterable[Operator], machine: Machine, precision: str, sms: int | None = None) -> float:
    """Summed time of operators that run one after the other."""
    return sum(operator.seconds(machine, precision, sms) for operator in operators)


def _attention_weights(shape: ModelShape) -> list[Weight]:
    prefix = "self_attn."
    return [
        replace(weight, name=weight.name.removeprefix(prefix))
        for weight in layer_weights(shape, 0, "")
        if weight.part is Part.ATTENTION
    ]


class Counter:
    """Writes down the work of micro-batches of `tokens` tokens, in rows of `length`.

    `recompute` names what is made again going back: some of `RECOMPUTED` in `layout.py`.
    `imbalance` is how many rows the busiest GPU's experts have over the mean: the others wait for it.
    """

    def __init__(
        self,
        shape: ModelShape,
        tokens: int,
        length: int,
        precision: str = "fp8",
        recompute: Collection[str] = REPORT_RECOMPUTES,
        imbalance: float = 1.0,
    ) -> None:
        self.shape, self.tokens, self.length = shape, tokens, length
        self.fp8 = precision == "fp8"
        self.value = 4 if precision == "fp32" else 2
        self.code = 1 if self.fp8 else self.value
        self.recompute = frozenset(recompute)
        self.imbalance = imbalance

    def embedding(self) -> Work:
        """The rows of the table, read and written; their gradient added."""
        moved = (self._moved("embedding", 2 * self.value * self.shape.hidden_size),)
        return Work(forward=moved, weights=moved)

    def attention(self) -> Work:
        """Multi-head latent attention with its norms and residual (report §2.1.1)."""
        s, v = self.shape, self.value
        d, heads = s.hidden_size, s.num_attention_heads
        linear = {w.name: (w.name, w.shape[1], w.shape[0]) for w in _attention_weights(s)}
        down = [linear["q_a_proj"], linear["kv_a_proj"]]
        up = [linear["q_b_proj"], linear["kv_b_proj"]]
        out = [linear["o_proj"]]
        lifted = sum(wide for _, _, wide in up)
        latents = sum(wide for _, wide, _ in up)
        rotary = self._moved("rotary", 2 * v * (heads + 1) * s.qk_rope_head_dim)
        # Half of the square of scores; going back also scores again, and four products instead of two.
        pairs = self.tokens * (self.length + 1) / 2 * 2 * heads
        qk, vd = s.qk_nope_head_dim + s.qk_rope_head_dim, s.v_head_dim
        norms = [self._moved("norm", 2 * v * (d + latents))]
        lift = [*self._products(up, "gemm"), rotary]
        forward = [
            *norms,
            *self._casts(d + latents),
            *self._products(down, "gemm"),
            *lift,
            Operator("attention", "attention", flops=pairs * (qk + vd)),
            *self._casts(heads * vd),
            *self._products(out, "gemm"),
            self._moved("residual", 3 * v * d),
        ]
        # In FP8 the norms' outputs wait as the codes that the products read, so nothing is made again.
        again = norms if self._again("norms") and not self.fp8 else []
        again = again + (lift if self._again("mla_up") else [])
        inputs = [
            *again,
            *self._casts(d),
            *self._products(out, "gemm"),
            Operator("attention backward", "attention_backward", flops=pairs * (3 * qk + 2 * vd)),
            rotary,
            *self._casts(lifted),
            *self._products(up, "gemm"),
            self._moved("norm backward", 4 * v * (latents + d)),
            *self._casts(latents),
            *self._products(down, "gemm"),
            self._moved("residual", 3 * v * d),
        ]
        return Work(tuple(forward), tuple(inputs), self._weights(down + up + out, "wgrad"))

    def mlp(self, width: int, name: str = "mlp") -> Work:
        """A SwiGLU network of all tokens: a dense layer's, or the shared experts as one."""
        if width == 0:
            return Work()
        return self._swiglu(width, self.tokens, name, "gemm")

    def experts(self) -> Work:
        """Router, rows to their experts, the routed experts, and back (report §2.1.2)."""
        s, v, code = self.shape, self.value, self.code
        d, k = s.hidden_size, s.num_experts_per_tok * self.imbalance
        gate = Operator("router", "plain", flops=2.0 * self.tokens * d * s.n_routed_experts)
        gather = self._moved("permute", 2 * code * k * d)
        # A GPU adds up the rows of a token that it holds; a token gets one sum from each of its nodes.
        reduce = self._moved("unpermute", v * d * (k + 2 * s.topk_group))
        inner = self._swiglu(s.moe_intermediate_size, self.tokens * k, "experts", "grouped")
        forward = [gate, gather, *inner.forward, reduce]
        inputs = [*self._casts(d), gather, *inner.inputs, reduce, gate]
        return Work(tuple(forward), tuple(inputs), (*inner.weights, gate))

    def block(self, moe: bool) -> Work:
        """One transformer layer."""
        s, v = self.shape, self.value
        d = s.hidden_size
        norm = self._moved("norm", 2 * v * d)
        # In FP8 networks read its output from codes, and the router alone from a copy that may be dropped.
        again = moe and self._again("router") if self.fp8 else self._again("norms")
        around = Work(
            (norm, *self._casts(d), self._moved("residual", 3 * v * d)),
            (
                *((norm,) if again else ()),
                self._moved("norm backward", 4 * v * d),
                self._moved("residual", 3 * v * d),
            ),
        )
        if moe:
            shared = self.mlp(s.n_shared_experts * s.moe_intermediate_size, "shared expert")
            work = self.attention() + around + shared + self.experts()
        else:
            work = self.attention() + around + self.mlp(s.intermediate_size)
        if "full" in self.recompute:
            return Work(work.forward, work.forward + work.inputs, work.weights)
        return work

    def head(self) -> Work:
        """Last norm, output projection in BF16 and cross-entropy."""
        s, v = self.shape, self.value
        product = Operator("head", "plain", flops=2.0 * self.tokens * s.hidden_size * s.vocab_size)
        norm = self._moved("norm", 2 * v * s.hidden_size)
        # Logits are written, read for the loss and overwritten with their gradient.
        logits = self._moved("loss", 3 * v * s.vocab_size)
        return Work((norm, product, logits), (product, norm), (product,))

    def mtp(self, moe: bool) -> Work:
        """One multi-token prediction module: two norms, its projection, a layer, the head (report §2.2)."""
        d = self.shape.hidden_size
        projection = [("mtp projection", 2 * d, d)]
        norms = self._moved("norm", 4 * self.value * d)
        products = tuple(self._products(projection, "gemm"))
        own = Work(
            (norms, *self._casts(2 * d), *products),
            (*self._casts(d), *products, norms),
            self._weights(projection, "wgrad"),
        )
        return own + self.block(moe) + self.head()

    def _swiglu(self, width: int, rows: float, name: str, rate: str) -> Work:
        d, v, code = self.shape.hidden_size, self.value, self.code
        share = rows / self.tokens
        weights = [(f"{name} gate and up", d, 2 * width), (f"{name} down", width, d)]
        products = self._products(weights, rate, rows)
        act = self._moved(f"{name} SwiGLU", share * (2 * v * width + code * width))
        back = self._moved(f"{name} SwiGLU backward", share * v * (2 + 1 + 2) * width)
        cast = self._casts(share * 2 * width)
        forward = [products[0], act, products[1]]
        inputs = [products[1], back, *cast, products[0]]
        # An FP8 network never keeps the outputs of SwiGLU (report §3.3.3), one that is made again neither.
        again = (act,) if self.fp8 or self._again("swiglu") else ()
        return Work(tuple(forward), tuple(inputs), (*again, *self._weights(weights, "wgrad", rows)))

    def _products(
        self, weights: list[tuple[str, int, int]], rate: str, rows: float | None = None
    ) -> list[Operator]:
        return [
            Operator(name, rate, flops=2.0 * (rows or self.tokens) * wide * out)
            for name, wide, out in weights
        ]

    def _weights(
        self, weights: list[tuple[str, int, int]], rate: str, rows: float | None = None
    ) -> tuple[Operator, ...]:
        """Weight gradients; in FP8 both operands are first requantised along the tokens (report §3.5.2)."""
        products = self._products(weights, rate, rows)
        if not self.fp8:
            return tuple(products)
        share = (rows or self.tokens) / self.tokens
        moved = share * sum(2 * (wide + out) for _, wide, out in weights)
        return (self._moved("requantise", moved), *products)

    def _casts(self, width: float) -> list[Operator]:
        """Values to FP8: nothing in other precisions."""
        return [self._moved("quantise", (self.value + 1) * width)] if self.fp8 else []

    def _moved(self, name: str, bytes_a_token: float) -> Operator:
        return Operator(name, "memory", bytes=float(self.tokens * bytes_a_token))

    def _again(self, name: str) -> bool:
        return name in self.recompute and "full" not in self.recompute
