"""AdamW with FP32 parameters and moments in BF16 (report §3.3.2): half the optimizer's memory.

`kernels.optim.adamw` defines the step: on a GPU it is one launch for all parameters of a group. The second
moment's update is 5% of its value a step at the report's beta2 = 0.95, far above BF16's rounding of 0.4%;
with a beta2 near 1 it would be lost, so that is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.optim.adamw import adamw_step
from kernels.optim.tensor_table import TensorTable


class BF16MomentAdamW(torch.optim.Optimizer):
    """Decoupled weight decay, bias-corrected moments; the same step as torch.optim.AdamW but for rounding.

    Parameters are FP32 and contiguous.
    """

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
        self._tables: defaultdict[int, TensorTable] = defaultdict(TensorTable)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or an optimizer read from a file, has tensors elsewhere."""
        super().__setstate__(state)
        self._tables = defaultdict(TensorTable)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for index, group in enumerate(self.param_groups):
            # A parameter without a gradient is left out, and is behind the others from then on.
            by_count: defaultdict[int, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
                # The count is read here, so it must not be on a device, where a checkpoint puts it.
                state["step"] = state["step"].cpu().add_(1)
                by_count[int(state["step"])].append(p)
            for count, params in by_count.items():
                adamw_step(
                    params,
                    [p.grad.contiguous() for p in params],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=count,
                    table=self._tables[index],
                )
