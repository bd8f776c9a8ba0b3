"""The attention kernels on a GPU against their references, at the published widths and others."""

import pytest
import torch

from kernels.attention import mla_decode as decoding
from kernels.attention.mla_attention import attention_reference, mla_attention
from kernels.attention.mla_attention_backward import gradients_reference
from kernels.attention.mla_decode import decode_reference, mla_decode
from kernels.attention.mla_tiles import document_starts
from kernels.metrics import relative_error
from tests.kernels.paged import paged_cache


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs here")]
PUBLISHED, DEMO, ODD = (128, 64, 128), (16, 16, 32), (10, 8, 14)
LIMITS = {torch.bfloat16: 0.01, torch.float32: 3e-5}
SCALE = 0.0721


def problem(
    shape: tuple[int, int, int], widths: tuple[int, int, int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """q, key_value, key_rotary and the gradient of the output, on the GPU."""
    n, r, v = widths
    generator = torch.Generator().manual_seed(0)
    shapes = ((*shape, n + r), (*shape, n + v), (*shape[:2], r), (*shape, v))
    return [torch.randn(size, generator=generator).to("cuda", dtype) for size in shapes]


def packed(batch: int, length: int) -> torch.Tensor:
    """Segments of random lengths, other ones in each row, with padding at the end."""
    generator = torch.Generator().manual_seed(1)
    segments = torch.randint(6, (batch, length), generator=generator).sort(1).values
    segments[:, length - length // 6 :] = -1
    return segments.cuda()


def both_ways(
    q: torch.Tensor,
    key_value: torch.Tensor,
    key_rotary: torch.Tensor,
    starts: torch.Tensor | None,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Output and gradients of the kernels."""
    leaves = [part.detach().clone().requires_grad_() for part in (q, key_value, key_rotary)]
    out = mla_attention(*leaves, SCALE, starts)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("widths", [PUBLISHED, DEMO, ODD])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (2, 129, 2), (1, 128, 4), (3, 515, 5), (1, 2048, 2)])
def test_attention_is_that_of_the_reference(shape, widths, dtype, documents) -> None:
    *parts, grad = problem(shape, widths, dtype)
    starts = document_starts(packed(*shape[:2])) if documents else None
    found = both_ways(*parts, starts, grad)
    wide = [part.float() for part in parts]  # the references then round nothing
    out, lse = attention_reference(*wide, SCALE, starts)
    expected = (out, *gradients_reference(grad.float(), *wide, out, lse, SCALE, starts))
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == dtype
        # Of a document of one position dq and dk are 0 but for the rounding of the output.
        error = (value.float() - wanted).norm() / wanted.norm().clamp(min=wanted.numel() ** 0.5 / 3)
        assert error < LIMITS[dtype]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_attention_gives_the_same_bits_again_and_never_waits() -> None:
    *parts, grad = problem((2, 700, 4), PUBLISHED, torch.bfloat16)
    segments = packed(2, 700)
    first = both_ways(*parts, document_starts(segments), grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = both_ways(*parts, document_starts(segments), grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_document_is_the_same_alone() -> None:
    *parts, grad = problem((1, 512, 2), PUBLISHED, torch.bfloat16)
    segments = (torch.arange(512, device="cuda") >= 256)[None]
    together = both_ways(*parts, document_starts(segments), grad)
    starts = torch.zeros(1, 256, dtype=torch.int32, device="cuda")
    alone = both_ways(*(part[:, 256:].contiguous() for part in parts), starts, grad[:, 256:].contiguous())
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[:, 256:], b)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_attention_lets_nan_and_infinity_surface(bad, part) -> None:
    *parts, grad = problem((1, 400, 2), PUBLISHED, torch.bfloat16)
    parts[part][0, 300] = bad
    out, *gradients = both_ways(*parts, None, grad)
    assert out[0, 300].isnan().all()
    assert not out[0, :256].isnan().any()
    assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "rank", "rotary", "first"),
    [(128, 512, 64, 0), (16, 512, 64, 1), (40, 48, 8, 16), (3, 20, 6, 0)],
)
def test_decoding_is_that_of_the_reference(heads, rank, rotary, first, dtype, index) -> None:
    lengths = [1, 15, 16, 17, 0, 1000, decoding.SPLIT, decoding.SPLIT + 1, 3 * decoding.SPLIT + 70]
    generator = torch.Generator().manual_seed(2)
    latents, table = paged_cache(lengths, rank + rotary, 16, generator)
    query = torch.randn(len(lengths), heads, rank + rotary, generator=generator).to("cuda", dtype)
    latents, table = latents.to("cuda", dtype), table.to("cuda", index)
    rows = torch.tensor(lengths, device="cuda", dtype=index)
    arguments = (query, latents, table, rows, SCALE)
    mla_decode(*arguments, rank=rank, first=first)  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mla_decode(*arguments, rank=rank, first=first)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wide = (query.float(), latents.float(), table, rows, SCALE)
    expected = decode_reference(*wide, rank, first=first)
    assert found.dtype == dtype
    assert relative_error(found, expected) < LIMITS[dtype]
    assert not found[rows <= first].any()
    for row in (3, 8):  # alone, in a longer table, a row has the same bits
        one = slice(row, row + 1)
        longer = torch.nn.functional.pad(table[one], (0, 200), value=-1)
        alone = mla_decode(query[one], latents, longer, rows[one], SCALE, rank=rank, first=first)
        assert torch.equal(alone[0], found[row])


def test_decoding_lets_nan_surface_in_its_row_alone() -> None:
    lengths = [1500, 40]
    latents, table = paged_cache(lengths, 576, 16, torch.Generator().manual_seed(3))
    latents[table[0, 50] * 16] = float("nan")
    query = torch.randn(2, 128, 576, generator=torch.Generator().manual_seed(4))
    found = mla_decode(
        query.bfloat16().cuda(),
        latents.bfloat16().cuda(),
        table.cuda(),
        torch.tensor(lengths).cuda(),
        SCALE,
        rank=512,
    )
    assert found[0].isnan().all()
    assert not found[1].isnan().any()
