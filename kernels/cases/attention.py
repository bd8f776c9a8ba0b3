"""The kernels of mla_attention.py and mla_attention_backward.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels import mla_attention, mla_attention_backward
from kernels.cases.case import Case
from kernels.mla_tiles import width_constants

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PUBLISHED, SMALL, ODD = (128, 64, 128), (16, 16, 32), (10, 8, 14)


def cases() -> Iterator[Case]:
    for dtype, widths, documents in (
        ("bf16", PUBLISHED, True),
        ("bf16", PUBLISHED, False),
        ("bf16", SMALL, True),
        ("bf16", ODD, True),
        ("fp32", PUBLISHED, True),
        ("fp32", ODD, True),
    ):
        yield from training_cases(dtype, widths, documents)


def training_cases(dtype: str, widths: tuple[int, int, int], documents: bool) -> Iterator[Case]:
    """Forward and backward kernels. Lengths are any, so only pointers are known to be aligned."""
    name = f"{dtype} {'+'.join(map(str, widths[:2]))}/{widths[2]}{', documents' * documents}"
    inputs = {"q": f"*{dtype}", "key_value": f"*{dtype}", "key_rotary": f"*{dtype}"}
    sums = {"lse": "*fp32", "delta": "*fp32"}
    sizes = {"T": "i32", "heads": "i32", "scale": "fp32"}
    for kernel, configs, types in (
        (
            mla_attention.forward_kernel,
            mla_attention.CONFIGS,
            {**inputs, "starts": "*i32", "out": f"*{dtype}", "lse": "*fp32"},
        ),
        (
            mla_attention_backward.dq_kernel,
            mla_attention_backward.DQ_CONFIGS,
            {"grad": f"*{dtype}", **inputs, **sums, "starts": "*i32", "dq": f"*{dtype}"},
        ),
        (
            mla_attention_backward.dkv_kernel,
            mla_attention_backward.DKV_CONFIGS,
            {"grad": f"*{dtype}", **inputs, **sums, "starts": "*i32", "ends": "*i32"}
            | {"d_key_value": f"*{dtype}", "by_head": "*fp32"},
        ),
    ):
        config = configs[DTYPES[dtype]]
        absent = {} if documents else {key: None for key in ("starts", "ends") if key in types}
        yield Case(
            name=f"mla_attention {kernel.__name__.removesuffix('_kernel')} {name}",
            kernel=kernel,
            types={**types, **sizes},
            constants={
                **absent,
                **width_constants(widths),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
            },
            aligned=tuple(types),
            options=config.options,
            exact=False,
        )
    yield Case(
        name=f"mla_attention delta {name}",
        kernel=mla_attention_backward.delta_kernel,
        types={"grad": f"*{dtype}", "out": f"*{dtype}", "delta": "*fp32", "T": "i32", "heads": "i32"},
        constants={
            "V": widths[2],
            "V_PAD": width_constants(widths)["V_PAD"],
            "ROWS": mla_attention_backward.DELTA_ROWS,
        },
        aligned=("grad", "out", "delta"),
        options=mla_attention_backward.DELTA_OPTIONS,
    )
