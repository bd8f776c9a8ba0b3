"""The GEMM over whole matrices, in each launch shape, from each kind of second operand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels.cases.case import Case
from kernels.formats import quantize
from kernels.gemms import gemm, gemm_tiles

HOPPER = 227 * 1024  # bytes of shared memory that a program may use


def piece_types(
    config: gemm_tiles.Config, out: str, leading: str = ""
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the descriptors of a launch shape, and the constants in place of absent ones."""
    m, widths = config.block_m, {"wide": config.wide, "narrow": config.narrow}
    types = {"a": f"tensordesc<fp8e4nv[{m},128]>"}
    for name, width in widths.items():
        if width:
            types[f"{name}_b"] = f"tensordesc<fp8e4nv[{width},128]>"
            types[f"{name}_out"] = f"tensordesc<{out}[{leading}{m},{width}]>"
    absent = {f"{name}_{part}": None for name, width in widths.items() if not width for part in ("b", "out")}
    return types, absent


def tile_constants(config: gemm_tiles.Config) -> dict[str, Any]:
    """The constants of every GEMM kernel."""
    return {
        "BLOCK_M": config.block_m,
        "WIDE": config.wide,
        "NARROW": config.narrow,
        "BAND": gemm_tiles.BAND,
    }


def products(config: gemm_tiles.Config) -> int:
    """Products that a step multiplies: one for each piece."""
    return 2 if config.narrow else 1


def options(config: gemm_tiles.Config, out: str) -> dict[str, Any]:
    """The launch options on Hopper, where no GPU can be asked."""
    stages = config.stages(4 if out == "fp32" else 2, HOPPER)
    return {"num_warps": config.num_warps, "num_stages": stages, "enable_fp_fusion": True}


def cases() -> Iterator[Case]:
    for b_block, add, outs in (
        (quantize.BLOCKS, False, ("bf16", "fp32")),
        (quantize.BLOCKS, True, ("fp32",)),
        (quantize.TILES, False, ("bf16", "fp32")),
        (quantize.TILES, True, ("fp32",)),
    ):
        tiles = b_block == quantize.TILES
        for config in gemm.configs_for(b_block, add=add):
            for out in outs:
                types, absent = piece_types(config, out)
                scales = {"a_scales": "*fp32", "b_scales": "*fp32"}
                sizes = {"M": "i32", "N": "i32", "GROUPS": "i32", "OUT_STRIDE": "i32"}
                yield Case(
                    name=f"gemm{'_add' * add} {config.block_m}x{config.block_n}, "
                    f"b in {b_block[0]}x{b_block[1]}, {out}",
                    kernel=gemm.gemm_kernel,
                    types={
                        **types,
                        **scales,
                        **({"out": "*fp32"} if add else {}),
                        **sizes,
                        "B_SCALE_STRIDE": "i32" if tiles else "1",
                    },
                    constants={
                        **absent,
                        **({} if add else {"out": None}),
                        **tile_constants(config),
                        "B_TILES": tiles,
                        "ADD": add,
                        "FLATTEN": not (tiles or add),
                    },
                    aligned=(*scales, "out", "N", "OUT_STRIDE", "B_SCALE_STRIDE"),
                    options=options(config, out),
                    tensor_core=True,
                    tma=True,
                    products=products(config),
                    ones=("GROUPS", "M", "N")
                    if config is gemm_tiles.SMALL and out == "fp32"
                    else ("GROUPS",),
                )
