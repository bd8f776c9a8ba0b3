"""The kernels of adamw.py and grad_norm.py."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases.case import Case
from kernels.optim import adamw, grad_norm

TABLE = {"rows": "*i64", "owners": "*i32"}


def cases() -> Iterator[Case]:
    factors = dict.fromkeys(adamw.Factors._fields, "fp32")
    for grad, copy, scaled in (("fp32", False, False), ("fp32", True, True), ("bf16", True, True)):
        yield Case(
            name=f"adamw_step grads {grad}{', BF16 copy' * copy}{', scaled' * scaled}",
            kernel=adamw.step_kernel,
            types={**TABLE, "grad_scale": "*fp32", **factors},
            constants={
                "BF16_GRAD": grad == "bf16",
                "COPY": copy,
                "CHUNK": adamw.CHUNK,
                **({} if scaled else {"grad_scale": None}),
            },
            aligned=(*TABLE, "grad_scale"),
            options=adamw.OPTIONS,
        )
    for grad in ("fp32", "bf16"):
        yield Case(
            name=f"grad_norm squares {grad}",
            kernel=grad_norm.squares_kernel,
            types={**TABLE, "sums": "*fp32"},
            constants={"BF16": grad == "bf16", "CHUNK": grad_norm.CHUNK},
            aligned=(*TABLE, "sums"),
            options=grad_norm.OPTIONS,
        )
    yield Case(
        name="grad_norm sums",
        kernel=grad_norm.sums_kernel,
        types={"values": "*fp32", "sums": "*fp32", "count": "i32"},
        constants={"CHUNK": grad_norm.CHUNK},
        aligned=("values", "sums"),
        options=grad_norm.OPTIONS,
        ones=("count",),
    )
