"""The GEMMs over grouped tokens, few experts and many."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cases.case import Case
from kernels.cases.gemm import options, piece_types, products, tile_constants
from kernels.formats import square
from kernels.gemms import gemm_tiles, grouped_gemm


def cases() -> Iterator[Case]:
    yield from _rows()
    yield from _sums()


def _rows() -> Iterator[Case]:
    for config in grouped_gemm.CONFIGS:
        for experts, offsets, out in ((256, "i64", "bf16"), (8, "i32", "fp32")):
            types, absent = piece_types(config, out)
            pointers = {"a_scales": "*fp32", "b_scales": "*fp32", "offsets": f"*{offsets}", "out": f"*{out}"}
            sizes = ("TOKENS", "NUM_EXPERTS", "N", "GROUPS", "OUT_STRIDE")
            yield Case(
                name=f"grouped_gemm {config.block_m}x{config.block_n}, {experts} experts, {out}",
                kernel=grouped_gemm.grouped_gemm_kernel,
                types={**types, **pointers, **dict.fromkeys(sizes, "i32")},
                constants={
                    **absent,
                    **tile_constants(config),
                    "EXPERTS": square.experts_range(experts),
                },
                aligned=(*pointers, "TOKENS", "N", "OUT_STRIDE"),
                options=options(config, out),
                tensor_core=True,
                tma=True,
                products=products(config) + 1,  # and one for the last tile of an expert
                ones=("GROUPS", "NUM_EXPERTS") if experts == 8 else (),
            )


def _sums() -> Iterator[Case]:
    for config in gemm_tiles.TILE_CONFIGS:
        for experts, offsets in ((256, "i64"), (8, "i32")):
            types, _ = piece_types(config, "fp32", leading="1,")
            pointers = {"a_scales": "*fp32", "b_scales": "*fp32", "offsets": f"*{offsets}", "out": "*fp32"}
            strides = ("B_SCALE_STRIDE", "EXPERT_STRIDE", "OUT_STRIDE")
            constants = {**tile_constants(config), "EXPERTS": square.experts_range(experts)}
            del constants["NARROW"]
            yield Case(
                name=f"grouped_gemm_k {config.block_m}x{config.block_n}, {experts} experts",
                kernel=grouped_gemm.grouped_gemm_k_kernel,
                types={
                    "a": types["a"],
                    "b": types["wide_b"],
                    "wide_out": types["wide_out"],
                    **pointers,
                    **dict.fromkeys(("NUM_EXPERTS", "N", "K", "GROUPS", *strides), "i32"),
                },
                constants=constants,
                aligned=(*pointers, "N", "K", *strides),
                options=options(config, "fp32"),
                tensor_core=True,
                tma=True,
                ones=("GROUPS", "NUM_EXPERTS") if experts == 8 else (),
            )
