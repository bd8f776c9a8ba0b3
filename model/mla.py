"""Multi-head Latent Attention (report §2.1.1, equations 1-11).

Keys and values of all heads are made from one latent a token (and one rotary key shared by the heads), and
only those are cached. Training expands the latent into heads; decoding absorbs the expansions into the
query and the output, so that attention runs directly on the cached latents.
Legend: B batch, T positions, D hidden, H heads, N content width, R rotary width, K = N + R, V value width, Q
query rank, C key-value rank, L cached positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.attention import attend, fused
from model.config import ModelConfig
from model.norm import RMSNorm
from model.precision import Precision
from model.recompute import remember
from model.yarn import rotate, softmax_scale

if TYPE_CHECKING:
    from kernels.layers.activation import FP8Activation


class MultiHeadLatentAttention(nn.Module):
    """Weights are stored [out, in], named after the published checkpoint layout."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        self.precision = precision
        c, heads = config, config.num_attention_heads
        self.q_a_proj = nn.Parameter(torch.empty(c.q_lora_rank, c.hidden_size))
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Parameter(torch.empty(heads * c.qk_head_dim, c.q_lora_rank))
        self.kv_a_proj = nn.Parameter(torch.empty(c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size))
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Parameter(
            torch.empty(heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        )
        self.o_proj = nn.Parameter(torch.empty(c.hidden_size, heads * c.v_head_dim))
        self.scale = softmax_scale(config)

    def queries(self, x_BTD: Tensor | FP8Activation, cos: Tensor, sin: Tensor) -> Tensor:
        """Content and rotated parts of every head's query: [B, T, H, N + R]. cos, sin: [T or B,T, R/2]."""
        raw_BTQ = self.precision.linear(x_BTD, self.q_a_proj)
        return remember(self._up_query(raw_BTQ, cos, sin), lambda: self._up_query(raw_BTQ, cos, sin))

    def _up_query(self, raw_BTQ: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.precision.linear(self.q_a_layernorm(raw_BTQ), self.q_b_proj)
        q = q.unflatten(-1, (self.config.num_attention_heads, -1))
        return rotate(q, cos.unsqueeze(-2), sin.unsqueeze(-2))

    def latents(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What decoding caches: normed latent and rotated shared key, [B, T, C + R]."""
        return torch.cat(self._latent_and_key(x_BTD, cos, sin), dim=-1)

    def _latent_and_key(
        self, x_BTD: Tensor | FP8Activation, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        raw = self.precision.linear(x_BTD, self.kv_a_proj)
        latent, rotary = raw.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return self.kv_a_layernorm(latent), rotate(rotary, cos, sin)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor | None = None) -> Tensor:
        """Expanded form, for training: [B, T, D] -> [B, T, D]; `bounds` are those of `model.attention`."""
        x = self.precision.operand(x_BTD)
        q_BTHK = self.queries(x, cos, sin)
        attention = self._attend_fused if fused(x_BTD.device) else self._attend
        return self._output(attention(q_BTHK, *self._latent_and_key(x, cos, sin), bounds).flatten(-2))

    def _attend_fused(
        self, q_BTHK: Tensor, latent_BTC: Tensor, key_BTR: Tensor, starts_BT: Tensor | None
    ) -> Tensor:
        """`_attend` in kernels that take content keys and values as they are made, and one rotary key."""
        from kernels.attention.mla_attention import mla_attention

        both = remember(self._up_latent(latent_BTC), lambda: self._up_latent(latent_BTC))
        return mla_attention(q_BTHK, both, key_BTR, self.scale, starts_BT)

    def _up_latent(self, latent_BTC: Tensor) -> Tensor:
        """Every head's content keys and values side by side, [B, T, H, N + V]."""
        heads = self.config.num_attention_heads
        return self.precision.linear(latent_BTC, self.kv_b_proj).unflatten(-1, (heads, -1))

    def _attend(self, q_BTHK: Tensor, latent_BTC: Tensor, key_BTR: Tensor, mask: Tensor | None) -> Tensor:
        """Attention after expanding latents into every head's keys and values: [B, T, H, V]."""
        both = remember(
            self._up_key_value(latent_BTC, key_BTR), lambda: self._up_key_value(latent_BTC, key_BTR)
        )
        width = self.config.qk_head_dim
        # Split and not indexed: going back, each index would fill a tensor as large as both.
        k_BTHK, v_BTHV = both.split((width, both.shape[-1] - width), dim=-1)
        out_BHTV = attend(*(x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV)), self.scale, mask)
        return out_BHTV[..., : self.config.v_head_dim].transpose(1, 2)

    def _output(self, heads: Tensor) -> Tensor:
        """What the heads give, [..., H * V], back in the residual stream; kept in E5M6 (§3.3.3)."""
        return self.precision.linear(heads, self.o_proj, e5m6=True)

    def _up_key_value(self, latent_BTC: Tensor, key_BTR: Tensor) -> Tensor:
        """Every head's keys and values side by side in one tensor, [B, T, H, K + V].

        Fused attention wants equal widths, so narrower values are padded with zeros: at 192/128 that costs a
        quarter more memory traffic on v and avoids the unfused path, which holds all scores.
        """
        c = self.config
        content, v_BTHV = self._up_latent(latent_BTC).split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        shared = key_BTR.unsqueeze(-2).expand(-1, -1, c.num_attention_heads, -1)
        padding = max(0, c.qk_head_dim - c.v_head_dim)
        zeros = (v_BTHV.new_zeros(()).expand(*v_BTHV.shape[:-1], padding),) if padding else ()
        return torch.cat((content, shared, v_BTHV, *zeros), dim=-1)

    def absorbed(self, q_BHK: Tensor, cache_BLW: Tensor, blocked_BL: Tensor | None) -> Tensor:
        """One new position a row against cached latents: q [B, H, N + R], cache [B, L, C + R] -> [B, D].

        W^UK moves into the query and W^UV behind the weighted sum, so no head's keys or values are ever made.
        This is the form in one place; the engine does the same over pages (`model/engine/forward.py`).
        `blocked_BL` is True at cache positions past a row's own length.
        """
        c = self.config
        kv_b = self.kv_b_proj.to(q_BHK.dtype).view(c.num_attention_heads, -1, c.kv_lora_rank)
        up_key_HNC, up_value_HVC = kv_b.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
        content, rotary = q_BHK.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        absorbed = torch.bmm(content.transpose(0, 1), up_key_HNC).transpose(0, 1)
        scores_BHL = torch.bmm(torch.cat((absorbed, rotary), dim=-1), cache_BLW.transpose(1, 2)).mul_(
            self.scale
        )
        if blocked_BL is not None:
            scores_BHL.masked_fill_(blocked_BL[:, None], float("-inf"))
        probs_BHL = scores_BHL.softmax(-1, dtype=torch.float32).to(cache_BLW.dtype)
        mixed_BHC = torch.bmm(probs_BHL, cache_BLW[..., : c.kv_lora_rank])
        out = torch.bmm(mixed_BHC.transpose(0, 1), up_value_HVC.transpose(1, 2)).transpose(0, 1)
        return self._output(out.flatten(1))
