"""The kernels of permute.py."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases.case import Case
from kernels.fused import permute


def cases() -> Iterator[Case]:
    hidden = {"hidden": "i32"}
    for aligned in (("hidden",), ()):
        yield Case(
            name=f"gather FP8 codes, 8 slots{'' if aligned else ', ragged'}",
            kernel=permute.gather_kernel,
            types={"x": "*u8", "place": "*i64", "weights": "*i64", "out": "*u8", **hidden},
            constants={"K": 8, "WEIGHTED": False, "BLOCK": permute.BYTE_BLOCK},
            aligned=("x", "place", "weights", "out", *aligned),
            options=permute.OPTIONS,
            ones=() if aligned else ("hidden",),
        )
    for slots, dtype, aligned in ((8, "bf16", ("hidden",)), (8, "fp32", ("hidden",)), (1, "bf16", ())):
        name = f"{dtype}, {slots} slots" + ("" if aligned else ", ragged")
        for weighted, weights in ((True, "fp32"), (True, "bf16"), (False, "i64")):
            variant = f"{name}, weights {weights}" if weighted else name
            types = {"weights": f"*{weights}", "out": f"*{dtype}", **hidden}
            constants = {"K": slots, "WEIGHTED": weighted, "BLOCK": permute.BLOCK}
            yield Case(
                name=f"gather {variant}",
                kernel=permute.gather_kernel,
                types={"x": f"*{dtype}", "place": "*i64", **types},
                constants=constants,
                aligned=("x", "place", "weights", "out", *aligned),
                options=permute.OPTIONS,
                ones=() if aligned else ("hidden",),
            )
            yield Case(
                name=f"combine {variant}",
                kernel=permute.combine_kernel,
                types={"y": f"*{dtype}", "place": "*i64", **types},
                constants=constants,
                aligned=("y", "place", "weights", "out", *aligned),
                options=permute.OPTIONS,
                ones=() if aligned else ("hidden",),
            )
        yield Case(
            name=f"weight_gradient {name}",
            kernel=permute.weight_gradient_kernel,
            types={"y": f"*{dtype}", "grad": f"*{dtype}", "place": "*i64", "out": "*fp32", **hidden},
            constants={"K": slots, "BLOCK": permute.BLOCK},
            aligned=("y", "grad", "place", "out", *aligned),
            options=permute.OPTIONS,
            ones=() if aligned else ("hidden",),
        )
