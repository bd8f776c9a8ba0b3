"""The whole model: embedding, layers, final norm, untied head, and the MTP modules (report §2).

Legend: B batch, T positions, D hidden, O vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import boundaries, shortened
from model.block import Block
from model.config import ModelConfig
from model.gate import Gate, Routing
from model.mtp import MTPModule
from model.norm import RMSNorm
from model.precision import Precision
from model.yarn import rotation_table


@dataclass
class Output:
    """Normed states ready for the head, main model first and then one a depth; and where tokens were
    routed."""

    states_BTD: list[Tensor]
    routings: list[Routing] = field(default_factory=list)


class Transformer(nn.Module):
    """`segments_BT` (document index a token, -1 for padding) separates samples when given; None packs
    freely."""

    def __init__(self, config: ModelConfig, precision: str = "fp32") -> None:
        super().__init__()
        self.config = config
        self.precision = Precision(precision)
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(
            Block(config, layer, self.precision) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.mtp = nn.ModuleList(
            MTPModule(config, depth, self.precision) for depth in range(config.num_nextn_predict_layers)
        )
        self._tables: tuple[Tensor, Tensor] | None = None

    def initialize(self, seed: int) -> Transformer:
        """Normal(0, initializer_range) for every matrix, ones for norms, zeros for routing biases (§4.2)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)
                else:
                    parameter.fill_(1.0)
            for gate in self.gates():
                gate.e_score_correction_bias.zero_()
        return self

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the first `length` positions, [length, R/2]; computed once and grown when needed."""
        device = self.embed_tokens.device
        if self._tables is None or self._tables[0].shape[0] < length or self._tables[0].device != device:
            # Doubled, so that decoding does not make it anew at every step.
            known = 0 if self._tables is None else self._tables[0].shape[0]
            size = max(length, self.config.original_max_position_embeddings, 2 * known)
            # A table first needed while generating must still serve training later.
            with torch.inference_mode(False):
                self._tables = rotation_table(self.config, size, device)
        cos, sin = self._tables
        return cos[:length], sin[:length]

    def gates(self) -> list[Gate]:
        """Routers in the order of `Output.routings`."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        mtp: bool = False,
        valid_BT: Tensor | None = None,
    ) -> Output:
        """States at every position; with `mtp`, also those of the prediction modules (each one shorter).

        `valid_BT` is False for padding, which counts nowhere in the routers' loads; by default what
        `segments_BT` says, and without it every token is real.
        """
        bounds = None if segments_BT is None else boundaries(segments_BT)
        if valid_BT is None and segments_BT is not None:
            valid_BT = segments_BT >= 0
        cos, sin = self.rotation(tokens_BT.shape[1])
        embedded = F.embedding(tokens_BT, self.embed_tokens).to(self.precision.activation_dtype)
        x, output = embedded, Output([])
        for layer in self.layers:
            x, routing = layer(x, cos, sin, bounds, valid_BT)
            output.routings.extend([routing] if routing else [])
        output.states_BTD.append(self.norm(x))
        for depth, module in enumerate(self.mtp if mtp else (), start=1):
            keep = tokens_BT.shape[1] - depth
            x, routing = module(
                x[:, :keep],
                embedded[:, depth:],
                cos[:keep],
                sin[:keep],
                None if bounds is None else shortened(bounds, keep),
                None if valid_BT is None else valid_BT[:, :keep],
            )
            output.routings.extend([routing] if routing else [])
            output.states_BTD.append(module.norm(x))
        return output

    def logits(self, state: Tensor) -> Tensor:
        """Scores over the vocabulary, float32."""
        return F.linear(state, self.lm_head.to(state.dtype)).float()


def build(config: ModelConfig, seed: int, precision: str = "fp32") -> Transformer:
    """A freshly initialised model."""
    return Transformer(config, precision).initialize(seed)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
