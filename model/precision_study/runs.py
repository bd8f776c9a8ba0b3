"""One run of the comparison: a variant and a seed in, its losses out.

Variants of a seed differ in exactly one thing from its `bf16` run: in the precision of the linear layers, in
rounding noise on the initial weights, or in the order of the data.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import HeadwaterError
from model.optim.build import Optimizer, OptimizerConfig
from model.precision import Precision
from model.precision_study.setting import Setting
from model.precision_study.text import Rows
from model.schedule import cosine
from model.train import LoopConfig, Position, Step, held_out_loss, train
from model.transformer import Transformer, build

NOISE = 2.0**-9
"""Largest relative change of a perturbed weight: that of rounding it to BF16."""
HELD_OUT = 0.05


@dataclass(frozen=True)
class Variant:
    """What a run changes against `bf16` of its seed."""

    precision: str = "bf16"
    power_of_two: bool = False
    """Whether all scales of FP8 are powers of two."""
    noise: int = 0
    """Which draw of noise its initial weights get; 0: none."""
    order: int = 0
    """Which order its batches come in; 0: that of the seed."""


VARIANTS = {
    "bf16": Variant(),
    "fp8": Variant("fp8"),
    "noise1": Variant(noise=1),
    "fp8_power_of_two": Variant("fp8", power_of_two=True),
    "noise2": Variant(noise=2),
    "order": Variant(order=1),
}
"""In the order in which a seed's runs are made."""


def one_run(setting: Setting, variant: str, seed: int, text: bytes, device: torch.device) -> dict[str, Any]:
    """Train once; the line that is kept of it: all training losses and the held-out loss, in nats.

    A run in BF16 also has `held_out_in_fp8`: what its weights cost when they are only read in FP8.
    """
    kind = VARIANTS[variant]
    split = int(len(text) * (1 - HELD_OUT))
    training = Rows(text[:split], setting.length, seed=seed + 1_000_000 * kind.order)
    held_out = Rows(text[split:], setting.length)
    model = build(setting.config, seed, kind.precision)
    use_precision(model, Precision(kind.precision, kind.power_of_two))
    if kind.noise:
        perturb(model, seed=1000 * seed + kind.noise)
    model.to(device)
    optimizer = Optimizer(model, OptimizerConfig(lr=setting.lr))

    def schedule(position: Position) -> Step | None:
        if position.step == setting.steps:
            return None
        scale = cosine(position.step, setting.steps, setting.warmup, floor=0.1)
        return Step(setting.rows, scale, mtp_weight=0.3, bias_speed=0.001)

    began = time.perf_counter()
    loop = LoopConfig(micro_rows=setting.rows, checkpoint_every=setting.steps)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        train(model, optimizer, training, schedule, loop, _NoStore(), log)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    if any("skipped" in line for line in lines):
        raise HeadwaterError(f"{variant}, seed {seed}: a step was not a number; lower the learning rate")
    rows = min(setting.held_out_rows, len(held_out.order))
    run = {
        "variant": variant,
        "seed": seed,
        "losses": [round(line["loss"], 6) for line in lines],
        "held_out": held_out_loss(model, held_out, rows)[0],
    }
    if kind.precision == "bf16":
        use_precision(model, Precision("fp8"))
        run["held_out_in_fp8"] = held_out_loss(model, held_out, rows)[0]
    return run | {"seconds": round(time.perf_counter() - began, 1)}


def use_precision(model: Transformer, precision: Precision) -> None:
    """Run every layer of `model` under `precision`."""
    for module in model.modules():
        if hasattr(module, "precision"):
            module.precision = precision


@torch.no_grad()
def perturb(model: Transformer, seed: int) -> None:
    """Multiply every weight by 1 + NOISE * u, u uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
        parameter.mul_(1 + NOISE * noise)


class _NoStore:
    """A run of minutes is made again instead of resumed."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        pass

    def latest(self) -> None:
        return None
