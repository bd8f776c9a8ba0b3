"""One transformer layer: pre-norm attention, then a dense or expert feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from model.config import ModelConfig
from model.ffn import SwiGLU
from model.gate import Routing
from model.mla import MultiHeadLatentAttention
from model.moe import MoE
from model.norm import RMSNorm
from model.precision import Precision


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, precision: Precision) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, precision)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU = (
            MoE(config, precision)
            if config.is_moe(layer)
            else SwiGLU(config.hidden_size, config.intermediate_size, precision)
        )

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor | None, valid_BT: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, bounds)
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            out, routing = self.mlp(normed, valid_BT)
            return x_BTD + out, routing
        return x_BTD + self.mlp(normed), None
