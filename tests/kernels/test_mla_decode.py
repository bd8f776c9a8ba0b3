"""Decoding attention over the paged cache against float64; and its kernels in the interpreter."""

import pytest
import torch

from kernels.attention.mla_decode import decode_triton, mla_decode
from kernels.metrics import relative_error
from tests.kernels.interpreter import needs_interpreter, run_interpreted
from tests.kernels.paged import paged_cache

LENGTHS = [1, 15, 16, 17, 1000]
SCALE = 0.2


def problem(
    lengths: list[int] = LENGTHS,
    heads: int = 3,
    rank: int = 48,
    rotary: int = 8,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, latents, page_table, lengths."""
    generator = torch.Generator().manual_seed(0)
    latents, table = paged_cache(lengths, rank + rotary, page, generator)
    query = torch.randn(len(lengths), heads, rank + rotary, generator=generator)
    return query.to(dtype), latents.to(dtype), table, torch.tensor(lengths)


def exact(
    query: torch.Tensor,
    latents: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    rank: int,
    page: int,
    first: int,
) -> torch.Tensor:
    """In float64, page by page."""
    out = torch.zeros(*query.shape[:2], rank, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        pages = [latents[int(p) * page : (int(p) + 1) * page] for p in table[row] if p >= 0]
        seen = torch.cat(pages)[first:length].double()
        if len(seen):
            out[row] = (query[row].double() @ seen.t() * SCALE).softmax(-1) @ seen[:, :rank]
    return out


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("first", [0, 1, 16])
@pytest.mark.parametrize(("heads", "rank", "rotary", "page"), [(3, 48, 8, 16), (1, 1, 1, 3), (130, 20, 6, 8)])
def test_against_float64(heads, rank, rotary, page, first, index) -> None:
    query, latents, table, lengths = problem(heads=heads, rank=rank, rotary=rotary, page=page)
    found = mla_decode(
        query, latents, table.to(index), lengths.to(index), SCALE, rank=rank, page=page, first=first
    )
    expected = exact(query, latents, table, lengths, rank, page, first)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-6
    assert not found[lengths <= first].any()


def test_bf16_errors_are_those_of_its_rounding() -> None:
    query, latents, table, lengths = problem(dtype=torch.bfloat16)
    found = mla_decode(query, latents, table, lengths, SCALE, rank=48)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact(query, latents, table, lengths, 48, 16, 0)) < 2.5e-3


def test_a_row_does_not_depend_on_the_others() -> None:
    query, latents, table, lengths = problem()
    together = mla_decode(query, latents, table, lengths, SCALE, rank=48)
    for row in range(len(LENGTHS)):
        one = slice(row, row + 1)
        alone = mla_decode(query[one], latents, table[one], lengths[one], SCALE, rank=48)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_surface_in_their_row_alone(bad) -> None:
    query, latents, table, lengths = problem()
    latents[table[4, 3] * 16 + 2] = bad
    found = mla_decode(query, latents, table, lengths, SCALE, rank=48)
    assert found[4].isnan().all()
    assert not found[:4].isnan().any()


def test_no_rows_and_rows_without_positions() -> None:
    query, latents, table, lengths = problem()
    assert mla_decode(query[:0], latents, table[:0], lengths[:0], SCALE, rank=48).shape == (0, 3, 48)
    assert mla_decode(query[:, :0], latents, table, lengths, SCALE, rank=48).shape == (5, 0, 48)
    found = mla_decode(query, latents, table[:, :0], torch.zeros_like(lengths), SCALE, rank=48)
    assert torch.equal(found, torch.zeros(5, 3, 48))


def test_bad_input_is_named() -> None:
    query, latents, table, lengths = problem()
    for arguments in (
        (query[0], latents, table, lengths),
        (query[..., :50], latents, table, lengths),
        (query, latents, table[:4], lengths),
        (query, latents, table, lengths[:4]),
    ):
        with pytest.raises(ValueError, match="they must be"):
            mla_decode(*arguments, SCALE, rank=48)
    for rank in (0, 56):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            mla_decode(query, latents, table, lengths, SCALE, rank=rank)
    for options in ({"page": 0}, {"first": -1}, {"page": 17}):
        with pytest.raises(ValueError, match="whole pages"):
            mla_decode(query, latents, table, lengths, SCALE, rank=48, **options)
    for wrong in (query.half(), query.bfloat16()):
        with pytest.raises(TypeError, match="query is"):
            mla_decode(wrong, latents, table, lengths, SCALE, rank=48)
    with pytest.raises(TypeError, match=r"page_table is torch\.float32"):
        mla_decode(query, latents, table.float(), lengths, SCALE, rank=48)
    with pytest.raises(TypeError, match=r"lengths is torch\.int16"):
        mla_decode(query, latents, table, lengths.short(), SCALE, rank=48)
    with pytest.raises(ValueError, match="lengths is on meta"):
        mla_decode(query, latents, table, lengths.to("meta"), SCALE, rank=48)
    with pytest.raises(ValueError, match="latents must be contiguous"):
        mla_decode(query, latents.t().contiguous().t(), table, lengths, SCALE, rank=48)
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale is"):
            mla_decode(query, latents, table, lengths, scale, rank=48)
    for length in (-1, 63 * 16 + 1):
        with pytest.raises(ValueError, match="lengths reach"):
            mla_decode(
                query, latents, table, lengths.index_fill(0, torch.tensor([2]), length), SCALE, rank=48
            )
    for page in (-1, latents.shape[0] // 16):
        wrong = table.clone()
        wrong[4, 2] = page
        with pytest.raises(ValueError, match="outside the cache"):
            mla_decode(query, latents, wrong, lengths, SCALE, rank=48)


@pytest.mark.parametrize(("rank", "rotary"), [(513, 64), (512, 65)])
def test_widths_that_no_tile_holds_are_named(rank, rotary) -> None:
    query, latents, table, lengths = problem(lengths=[3], rank=rank, rotary=rotary)
    with pytest.raises(ValueError, match=r"mla_decode: the widths are .* at most \(512, 64\)"):
        decode_triton(query, latents, table, lengths, SCALE, rank)


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted_decode.py")
