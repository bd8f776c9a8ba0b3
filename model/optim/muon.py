"""Muon: momentum whose matrix updates are orthogonalised before they are applied (K. Jordan and others,
2024).

At small token budgets it learns clearly faster than AdamW. Matrices of one shape are orthogonalised
together, and stacked expert weights count as that many matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients with the steepest slope at zero; singular values end up between about 0.7 and
1.2."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: [N, rows, columns] -> same shape, float32."""
    a, b, c = _QUINTIC
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns)); decoupled weight decay."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state: dict[str, Any] = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                by_shape[p.shape[-2:]].append((p, update))
            for shape, pairs in by_shape.items():
                stacked = torch.cat([update.reshape(-1, *shape) for _, update in pairs])
                updates = orthogonalize(stacked).mul_(max(1.0, shape[0] / shape[1]) ** 0.5)
                sizes = [p.numel() // (shape[0] * shape[1]) for p, _ in pairs]
                for (p, _), update in zip(pairs, updates.split(sizes), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p).to(p.dtype), alpha=-group["lr"])
