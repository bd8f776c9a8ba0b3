"""A machine's published peak. What a model's token takes is counted in `infra.cluster.counts.accounting`."""

from __future__ import annotations

import torch

from infra.cluster.machines import MACHINES

_OTHERS = {"H100 PCIe": (756e12, 1513e12), "A100": (312e12, 0.0)}
"""Dense BF16 and FP8 operations a second of cards that no cluster is planned with, from their data sheets.
Sought first: another H100 would be found in the name of the first."""


def peak_flops(device: torch.device, precision: str) -> float:
    """Published peak in operations a second of a known GPU for a precision policy, 0.0 where none is
    known."""
    if device.type != "cuda" or precision == "fp32":
        return 0.0
    name = torch.cuda.get_device_name(device)
    known = _OTHERS | {each.name.upper(): (each.bf16, each.fp8) for each in MACHINES.values()}
    for part, (bf16, fp8) in known.items():
        if part in name:
            return fp8 if precision == "fp8" else bf16
    return 0.0
