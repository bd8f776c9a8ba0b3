"""The kernels of mla_attention.py, mla_attention_backward.py and mla_decode.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.attention import mla_attention, mla_attention_backward, mla_decode
from kernels.attention.mla_tiles import padded_width, width_constants
from kernels.cases.case import Case

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PUBLISHED, ODD = (128, 64, 128), (10, 8, 14)


def cases() -> Iterator[Case]:
    for dtype, widths, documents in (
        ("bf16", PUBLISHED, True),
        ("bf16", PUBLISHED, False),
        ("bf16", ODD, True),
        ("fp32", PUBLISHED, True),
    ):
        yield from training_cases(dtype, widths, documents)
    for dtype, heads, rank, rotary, index in (
        ("bf16", 128, 512, 64, "i64"),
        ("bf16", 16, 512, 64, "i32"),
        ("fp32", 128, 512, 64, "i64"),
    ):
        yield from decoding_cases(dtype, heads, rank, rotary, index)


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
            bf16_tensor_core=dtype == "bf16",
            # Not in FP32, which is for checks: the backward pass of one position spills two registers there.
            ones=("T", "heads") if dtype == "bf16" and documents and widths == PUBLISHED else (),
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
        ones=("T", "heads") if documents and widths == PUBLISHED else (),
    )


def decoding_cases(dtype: str, heads: int, rank: int, rotary: int, index: str) -> Iterator[Case]:
    """One split of a row, and the sum over splits."""
    config = mla_decode.config_for(heads, DTYPES[dtype])
    name = f"{dtype} {heads} heads, {rank}+{rotary}, table {index}"
    tables = {"page_table": f"*{index}", "lengths": f"*{index}"}
    results = {"out": f"*{dtype}", "parts": "*fp32", "lse": "*fp32"}
    sizes = {"heads": "i32", "splits": "i32", "begin": "i32"}
    yield Case(
        name=f"mla_decode split {name}",
        kernel=mla_decode.decode_kernel,
        types={"query": f"*{dtype}", "latents": f"*{dtype}", **tables, **results, **sizes}
        | {"pages": "i32", "scale": "fp32"},
        constants={
            "C": rank,
            "R": rotary,
            "C_PAD": padded_width(rank),
            "R_PAD": padded_width(rotary),
            "PAGE": 16,
            "SPLIT": mla_decode.SPLIT,
            "HEADS": config.heads,
            "BLOCK": config.positions,
        },
        aligned=("query", "latents", *tables, *results),
        options=config.options,
        exact=False,
        bf16_tensor_core=config is mla_decode.MANY_HEADS,
        ones=("splits", "pages"),
    )
    yield Case(
        name=f"mla_decode combine {name}",
        kernel=mla_decode.combine_kernel,
        types={"lengths": f"*{index}", **results, **sizes},
        constants={"C": rank, "C_PAD": padded_width(rank), "SPLIT": mla_decode.SPLIT},
        aligned=("lengths", *results),
        options=mla_decode.COMBINE_OPTIONS,
        exact=False,
        ones=("splits",),
    )
