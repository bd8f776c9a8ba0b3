"""The kernel of cross_entropy.py."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases.case import Case
from kernels.fused import cross_entropy


def cases() -> Iterator[Case]:
    for dtype, gradient, aligned in (
        ("bf16", True, ("vocabulary",)),
        ("bf16", False, ("vocabulary",)),
        ("fp32", True, ("vocabulary",)),
        ("fp32", True, ()),
    ):
        yield Case(
            name=f"cross_entropy {dtype}{', gradient' * gradient}{'' if aligned else ', ragged'}",
            kernel=cross_entropy.softmax_kernel,
            types={
                "logits": f"*{dtype}",
                "targets": "*i64",
                "losses": "*fp32",
                "vocabulary": "i32",
                "z_loss": "fp32",
            },
            constants={
                "IGNORED": cross_entropy.IGNORED,
                "GRADIENT": gradient,
                "BLOCK": cross_entropy.STEP_BYTES // {"bf16": 2, "fp32": 4}[dtype],
                "GROUP": 16 // {"bf16": 2, "fp32": 4}[dtype],
            },
            aligned=("logits", "targets", "losses", *aligned),
            options=cross_entropy.OPTIONS,
            exact=False,
            ones=() if aligned else ("vocabulary",),
        )
