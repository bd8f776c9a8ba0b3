"""Run by test_mla_decode.py in a process of its own, under TRITON_INTERPRET=1.

The interpreter gets products of BF16 wrong, so everything is FP32; the tiles of BF16 are tried on FP32 too.
Splits are short, so that a row has several. What a kernel leaves unwritten shows as NaN, and so does whatever
it reads of the cache that is not the row's.
"""

from unittest import mock

import numpy as np
import torch

from kernels.attention import mla_decode
from kernels.metrics import relative_error
from tests.kernels.interpreted_attention import poisoned_new_empty
from tests.kernels.paged import paged_cache

LENGTHS = [1, 15, 16, 17, 0, 63, 64, 65, 200]


def found_by_triton(*arguments, config: mla_decode.Config, split: int) -> torch.Tensor:
    with (
        mock.patch.object(torch.Tensor, "new_empty", poisoned_new_empty),
        mock.patch.object(mla_decode, "config_for", return_value=config),
        mock.patch.object(mla_decode, "SPLIT", split),
        np.errstate(all="ignore"),
    ):
        return mla_decode.decode_triton(*arguments)


def check_agreement(generator: torch.Generator) -> None:
    for heads, (rank, rotary), page, config, split, first, index in (
        (3, (48, 8), 16, mla_decode.FP32, 64, 0, torch.int64),
        (20, (32, 16), 16, mla_decode.FEW_HEADS, 64, 1, torch.int32),
        (65, (20, 6), 8, mla_decode.MANY_HEADS, 64, 64, torch.int64),
    ):
        latents, table = paged_cache(LENGTHS, rank + rotary, page, generator)
        query = torch.randn(len(LENGTHS), heads, rank + rotary, generator=generator)
        lengths = torch.tensor(LENGTHS, dtype=index)
        arguments = (query, latents, table.to(index), lengths, 0.3, rank, page, first)
        found = found_by_triton(*arguments, config=config, split=split)
        expected = mla_decode.decode_reference(*arguments)
        assert relative_error(found, expected) < 1e-6, (heads, rank, rotary, page, split, first)
        assert not found[lengths <= first].any()
        # A row alone, and in a longer table, is the same row.
        wide = torch.nn.functional.pad(table.to(index)[-1:], (0, 40), value=-(2**31))
        alone = found_by_triton(
            query[-1:], latents, wide, lengths[-1:], 0.3, rank, page, first, config=config, split=split
        )
        assert torch.equal(alone[0], found[-1])


def check_surfacing(generator: torch.Generator) -> None:
    for bad, position in ((torch.nan, 3), (torch.inf, 150)):
        latents, table = paged_cache(LENGTHS, 40, 16, generator)
        latents[table[-1, position // 16] * 16 + position % 16] = bad
        query = torch.randn(len(LENGTHS), 2, 40, generator=generator)
        arguments = (query, latents, table, torch.tensor(LENGTHS), 0.3, 32)
        found = found_by_triton(*arguments, config=mla_decode.FP32, split=64)
        assert found[-1].isnan().all()
        assert not found[:-1].isnan().any()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    check_agreement(generator)
    check_surfacing(generator)
    print("interpreted kernels agree")


if __name__ == "__main__":
    main()
