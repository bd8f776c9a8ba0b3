"""A cache of latents in scattered pages, for the tests of decoding."""

import torch


def paged_cache(
    lengths: list[int], width: int, page: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [slots, width], page table [rows, pages]): rows of these lengths in pages of random places.

    Slots that no row uses are NaN, and table entries past a row's pages are far outside the cache.
    """
    pages = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(pages) + 3, generator=generator)
    latents = torch.full((len(order) * page, width), torch.nan)
    table = torch.full((len(lengths), max(pages)), -(2**30), dtype=torch.int64)
    taken = 0
    for row, length in enumerate(lengths):
        own = order[taken : taken + pages[row]]
        taken += pages[row]
        table[row, : pages[row]] = own
        positions = torch.arange(length)
        slots = own[positions // page] * page + positions % page
        latents[slots] = torch.randn(length, width, generator=generator)
    return latents, table
