"""AdamW with FP32 parameters and moments in BF16 (report §3.3.2): half the optimizer's memory.

Moments are widened for the arithmetic of a step and rounded to BF16 when they are put away. The second
moment's update is 5% of its value a step at the report's beta2 = 0.95, far above BF16's rounding of 0.4%;
with a beta2 near 1 it would be lost, so that is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class BF16MomentAdamW(torch.optim.Optimizer):
    """Decoupled weight decay, bias-corrected moments; the same step as torch.optim.AdamW but for rounding."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        if betas[1] > 0.99:
            raise ValueError(
                f"optimizer.beta2 is {betas[1]}: BF16 moments round away updates that small; "
                "keep moments in fp32"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                count = float(state["step"])
                grad: Tensor = p.grad.float()
                mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
                square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)
                scale = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**count))
