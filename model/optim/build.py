"""Optimizers as training asks for them: AdamW as in the report (§4.2), or Muon for the matrices beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.optim.adamw import BF16MomentAdamW
from model.optim.muon import Muon
from model.transformer import Transformer


@dataclass(frozen=True)
class OptimizerConfig:
    """Step sizes are the peaks that a schedule multiplies."""

    name: str = "adamw"
    """adamw, or muon: Muon for the matrices inside layers, AdamW for the rest."""
    lr: float = 2.2e-4
    """Peak learning rate of AdamW's parameters."""
    muon_lr: float = 8e-3
    """Peak learning rate of Muon's parameters."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    """Not published in the report."""
    weight_decay: float = 0.1
    """Of AdamW; matrices only."""
    clip: float = 1.0
    """Largest global gradient norm."""
    moments: str = "fp32"
    """What AdamW keeps its moments in: fp32, or bf16 as in the report (§3.3.2)."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name is {self.name!r}: choose adamw or muon")
        if self.moments not in ("fp32", "bf16"):
            raise ValueError(f"optimizer.moments is {self.moments!r}: choose fp32 or bf16")
        if self.clip <= 0:
            raise ValueError(f"optimizer.clip is {self.clip}: it must be positive")


class Optimizer:
    """One step over all parameters, however many optimizers share them."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [(n, p) for n, p in self.named if config.name == "muon" and p.dim() > 1 and _in_layer(n)]
        inner_names = {name for name, _ in inner}
        outer = [(n, p) for n, p in self.named if n not in inner_names]
        decayed = [p for _, p in outer if p.dim() > 1]
        plain = [p for _, p in outer if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        filled = [group for group in groups if group["params"]]
        self.parts: list[torch.optim.Optimizer] = [
            BF16MomentAdamW(filled, **settings)
            if config.moments == "bf16"
            else torch.optim.AdamW(filled, **settings, fused=True)
        ]
        if inner:
            self.parts.append(Muon([p for _, p in inner], lr=config.muon_lr))
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def clip(self) -> float:
        """Clip the gradients; returns their norm before."""
        return float(nn.utils.clip_grad_norm_([p for _, p in self.named], self.config.clip))

    def apply(self, scale: float) -> None:
        """Step with every peak learning rate times `scale`, and clear the gradients."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            part.step()
            part.zero_grad()

    def step(self, scale: float) -> float:
        """Clip, apply; returns the gradient norm before clipping."""
        norm = self.clip()
        self.apply(scale)
        return norm

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, for a checkpoint."""
        return {f"{name}.{key}": value for name, key, value in self._entries()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_tensors`; ValueError names a parameter that the checkpoint does not know."""
        names = {name for name, _ in self.named}
        states = {id(p): part.state[p] for part in self.parts for g in part.param_groups for p in g["params"]}
        by_name = dict(self.named)
        for key, tensor in tensors.items():
            name, _, field = key.rpartition(".")
            if name not in names:
                raise ValueError(f"optimizer state for {name!r}, which this model does not have")
            states[id(by_name[name])][field] = tensor.to(by_name[name].device, copy=True)

    def _entries(self) -> Iterator[tuple[str, str, Tensor]]:
        names = {id(p): name for name, p in self.named}
        for part in self.parts:
            for parameter, state in part.state.items():
                for key, value in state.items():
                    yield names[id(parameter)], key, value


def _in_layer(name: str) -> bool:
    """Whether a parameter sits inside a layer; embedding, head and gates are left to AdamW."""
    return name.startswith(("layers.", "mtp.")) and ".gate.weight" not in name


def build_optimizer(model: Transformer, config: OptimizerConfig) -> Optimizer:
    return Optimizer(model, config)
