"""The one error metric of this folder, and its limits."""

from __future__ import annotations

import torch

# Limits of a GEMM's relative error against float64 on the same (dequantised) inputs. Rounding the output to
# BF16 alone costs 1.7e-3.
MAX_ERROR_FP32 = 1e-3
MAX_ERROR_BF16 = 2.5e-3
# What rounding to BF16 can cost at most, with the FP32 arithmetic before it: a few outliers may come near it.
MAX_ROUNDING_BF16 = 2.0**-8 + 1e-5


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative Frobenius error |value - reference| / |reference|, computed in float64.

    A NaN or infinity in either tensor gives NaN or infinity, which fails every `<` comparison. A reference of
    zeros gives 0 if the value is zero too, else infinity.

    Raises:
        ValueError: the shapes differ (they would broadcast unnoticed).
    """
    if value.shape != reference.shape:
        raise ValueError(
            f"relative_error: value has shape {tuple(value.shape)}, reference {tuple(reference.shape)}; "
            "they must be equal"
        )
    value64, reference64 = value.detach().double(), reference.detach().double()
    error = torch.linalg.vector_norm(value64 - reference64).item()
    norm = torch.linalg.vector_norm(reference64).item()
    if norm == 0.0:
        return 0.0 if error == 0.0 else float("nan") if error != error else float("inf")
    return error / norm
