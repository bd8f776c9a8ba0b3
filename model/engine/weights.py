"""The model's weights in the form that decoding reads: cast once, laid out for few rows, joined where two
products have one input.

Taken from the model when the engine is made, and again whenever the model's own weights have changed (see
`Weights.stale`), as they do between the steps of reinforcement learning. What is read as it is stored (norms,
the embedding) is shared with the model and not copied. Products are written x @ W with W
[in, out]: for few rows on a CPU that layout is up to twice as fast as the transposed one.
Legend: D hidden, H heads, N content width, R rotary width, V value width, Q query rank, C key-value rank,
E experts, F expert width, O vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.formats.quantize import quantize_blocks, quantize_tiles
from kernels.gemms.gemm import gemm
from model.block import Block
from model.ffn import SwiGLU
from model.gate import Gate
from model.moe import MoE
from model.norm import RMSNorm
from model.precision import Precision
from model.transformer import Transformer

SAMPLED = 64
"""Values of a weight that are looked at to see whether it has changed."""


class Matrix:
    """x [S, in] -> x @ W [S, out] under a precision policy. Several weights [out, in] with one input are
    joined along their outputs. `power_of_two` gives x such scales under `fp8`, as training does there."""

    def __init__(self, precision: Precision, *weights: Tensor, power_of_two: bool = False) -> None:
        self.fp8 = precision.fp8
        self.power_of_two = power_of_two or precision.power_of_two
        if self.fp8:
            # Joined they would share blocks across the seam, and round otherwise than in training.
            scales = precision.power_of_two
            self.blocks = [quantize_blocks(w.detach(), power_of_two=scales) for w in weights]
        else:
            joined = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
            self.weight = laid_out(joined.t(), precision.activation_dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.fp8:
            return x @ self.weight
        codes = quantize_tiles(x, power_of_two=self.power_of_two)
        products = [gemm(codes, blocks, x.dtype) for blocks in self.blocks]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def add_to(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y @ W."""
        return x + self(y) if self.fp8 else torch.addmm(x, y, self.weight)


def laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [..., in, out] cast, and contiguous on a CPU; a GPU reads either layout equally well."""
    weight = weight.detach().to(dtype)
    return weight if weight.is_cuda else weight.contiguous()


class Norm:
    """RMSNorm of rows [S, n], times `scale`, in few operators: there are many norms to a decoding step."""

    def __init__(self, norm: RMSNorm, scale: float = 1.0) -> None:
        weight = norm.weight.detach()
        self.weight = weight * scale if scale != 1.0 else weight
        self.eps = torch.full((1,), norm.eps, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (wide * inverse).mul_(self.weight).to(x.dtype)


class AttentionWeights:
    """One layer's attention."""

    def __init__(self, block: Block, precision: Precision) -> None:
        attention, c = block.self_attn, block.self_attn.config
        self.config = c
        self.input_norm = Norm(block.input_layernorm)
        self.down = Matrix(precision, attention.q_a_proj, attention.kv_a_proj)
        # The factor on scores is linear in the query, so the query's norm carries it for all that follows.
        self.query_norm = Norm(attention.q_a_layernorm, attention.scale)
        self.latent_norm = Norm(attention.kv_a_layernorm)
        self.up_query = Matrix(precision, attention.q_b_proj)
        self.up_key_value = Matrix(precision, attention.kv_b_proj)
        kv_b = attention.kv_b_proj.detach().to(precision.activation_dtype)
        kv_b = kv_b.view(c.num_attention_heads, -1, c.kv_lora_rank)
        self.up_key_HNC, up_value_HVC = kv_b.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
        self.up_value_HCV = laid_out(up_value_HVC.transpose(1, 2), kv_b.dtype)
        self.out = Matrix(precision, attention.o_proj, power_of_two=True)


class FeedForwardWeights:
    """A dense network or shared experts: gate and up [D, 2F], down [F, D]."""

    def __init__(self, network: SwiGLU, precision: Precision, shared: bool = False) -> None:
        self.gate_up = Matrix(precision, network.gate_up_proj, power_of_two=shared)
        self.down = Matrix(precision, network.down_proj)


class ExpertWeights:
    """Router, routed experts and shared ones of a layer."""

    def __init__(self, moe: MoE, precision: Precision) -> None:
        self.gate: Gate = moe.gate
        self.bias_E = moe.gate.e_score_correction_bias.detach()
        self.router_DE = laid_out(moe.gate.weight.t(), torch.float32)
        self.count = moe.gate.config.n_routed_experts
        experts = moe.experts
        if precision.name == "fp8":
            self.grouped = False
            self.gate_up, self.down = (
                [Matrix(precision, w, power_of_two=True) for w in weights.detach()]
                for weights in (experts.gate_up_proj, experts.down_proj)
            )
        else:
            self.grouped = True
            self.gate_up_EDF = laid_out(experts.gate_up_proj.transpose(1, 2), precision.activation_dtype)
            self.down_EFD = laid_out(experts.down_proj.transpose(1, 2), precision.activation_dtype)
            self._each = list(zip(self.gate_up_EDF.unbind(), self.down_EFD.unbind(), strict=True))
        shared = moe.shared_experts
        self.shared = FeedForwardWeights(shared, precision, shared=True) if shared is not None else None

    def expert(self, e: int, x: Tensor) -> Tensor:
        """One expert on rows [S, D]."""
        if self.grouped:
            gate_up, down = self._each[e]
            return opened(x @ gate_up) @ down
        return self.down[e](opened(self.gate_up[e](x)))


def opened(both: Tensor) -> Tensor:
    """silu(gate) * up of both halves side by side: [..., 2F] -> [..., F]."""
    gate, up = both.chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up)


class BlockWeights:
    def __init__(self, block: Block, precision: Precision) -> None:
        self.attention = AttentionWeights(block, precision)
        self.post_norm = Norm(block.post_attention_layernorm)
        self.mlp: ExpertWeights | FeedForwardWeights = (
            ExpertWeights(block.mlp, precision)
            if isinstance(block.mlp, MoE)
            else FeedForwardWeights(block.mlp, precision)
        )


class DraftWeights:
    """The first prediction module, which drafts."""

    def __init__(self, model: Transformer) -> None:
        module = model.mtp[0]
        self.token_norm, self.hidden_norm = Norm(module.enorm), Norm(module.hnorm)
        self.join = Matrix(model.precision, module.eh_proj)
        self.block = BlockWeights(module.block, model.precision)
        self.norm = Norm(module.norm)


class Weights:
    """A snapshot of a model for decoding; `draft` also takes the first prediction module."""

    def __init__(self, model: Transformer, draft: bool) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.model = model
            self.dtype = model.precision.activation_dtype
            self.layers = [BlockWeights(layer, model.precision) for layer in model.layers]
            self.norm = Norm(model.norm)
            self.head_DO = laid_out(model.lm_head.t(), self.dtype)
            self.draft = DraftWeights(model) if draft else None
            self._sample = _sample(model)

    @property
    def stale(self) -> bool:
        """Whether the model has been trained on, or loaded anew, since. It looks at some values of every
        weight; a change of single values elsewhere goes unseen."""
        return not torch.equal(self._sample, _sample(self.model))

    def embed(self, tokens_S: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_S, self.model.embed_tokens.detach()).to(self.dtype)

    def logits(self, states_SD: Tensor) -> Tensor:
        """Scores over the vocabulary of normed states, float32."""
        return (states_SD @ self.head_DO).float()


def _tensors(model: Transformer) -> list[Tensor]:
    return [*model.parameters(), *(gate.e_score_correction_bias for gate in model.gates())]


def _sample(model: Transformer) -> Tensor:
    """A few values of every weight. Torch's own count of writes misses fused optimizers; these do not."""
    flat = [tensor.detach().reshape(-1) for tensor in _tensors(model)]
    return torch.cat([values[:: max(1, values.numel() // SAMPLED)].float() for values in flat])
