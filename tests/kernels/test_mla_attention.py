"""Attention of MLA in training against float64, all scores at once; and its kernels in the interpreter."""

import pytest
import torch

from kernels.attention import mla_tiles
from kernels.attention.mla_attention import attention_reference, attention_triton, mla_attention
from kernels.attention.mla_tiles import document_ends, document_starts
from kernels.metrics import relative_error
from tests.kernels.interpreter import needs_interpreter, run_interpreted

SCALE = 0.3


def problem(
    batch: int,
    length: int,
    heads: int,
    widths: tuple[int, int, int] = (10, 8, 14),
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """q, key_value, key_rotary."""
    n, r, v = widths
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, heads, n + r), (batch, length, heads, n + v), (batch, length, r))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def packed(batch: int, length: int) -> torch.Tensor:
    """Segments of random lengths, other ones in each row, with padding at the end."""
    generator = torch.Generator().manual_seed(1)
    segments = torch.randint(6, (batch, length), generator=generator).sort(1).values
    segments[:, length - length // 6 :] = -1
    return segments


def exact(
    parts: list[torch.Tensor], segments: torch.Tensor | None, grad: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Output and gradients in float64, from keys copied to the heads and a mask."""
    q, key_value, key_rotary = leaves = [part.detach().double().requires_grad_() for part in parts]
    n = q.shape[-1] - key_rotary.shape[-1]
    shared = key_rotary[:, :, None].expand(*q.shape[:3], -1)
    keys = torch.cat((key_value[..., :n], shared), -1)
    scores = torch.einsum("bthk,bshk->bhts", q, keys) * SCALE
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    p = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    out = torch.einsum("bhts,bshv->bthv", p, key_value[..., n:])
    return out.detach(), *(torch.autograd.grad(out, leaves, grad.double()) if grad is not None else ())


def close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> bool:
    """To the limit, of values near 1 where a gradient is 0 but for rounding: in documents of one position."""
    assert found.shape == expected.shape
    error = (found.double() - expected).norm()
    return bool(error <= limit * expected.norm().clamp(min=expected.numel() ** 0.5))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((2, 7, 3), (10, 8, 14)),
        ((3, 129, 2), (16, 16, 32)),
        ((2, 300, 1), (3, 5, 2)),
        ((1, 40, 2), (128, 64, 128)),
    ],
)
def test_output_and_gradients_against_float64(shape, widths, documents) -> None:
    parts = problem(*shape, widths)
    segments = packed(*shape[:2]) if documents else None
    out = mla_attention(*parts, SCALE, document_starts(segments) if documents else None)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = (out, *torch.autograd.grad(out, parts, grad))
    for value, expected in zip(found, exact(parts, segments, grad), strict=True):
        assert close(value, expected, 2e-6)


def test_bf16_errors_are_those_of_its_rounding() -> None:
    parts, segments = problem(2, 200, 2, dtype=torch.bfloat16), packed(2, 200)
    out = mla_attention(*parts, SCALE, document_starts(segments))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = (out, *torch.autograd.grad(out, parts, grad))
    for value, expected in zip(found, exact(parts, segments, grad), strict=True):
        assert value.dtype == torch.bfloat16
        assert relative_error(value, expected) < 0.01


def test_the_log_sum_exp_is_that_of_the_scores_to_base_2() -> None:
    q, key_value, key_rotary = problem(1, 5, 1, (1, 1, 1))
    lse = attention_reference(q, key_value, key_rotary, SCALE)[1]
    keys = torch.cat((key_value[0, :, 0, :1], key_rotary[0]), -1)
    scores = (q[0, 4, 0] @ keys.t()).double() * SCALE
    assert lse.shape == (1, 1, 5)
    assert torch.allclose(lse[0, 0, 4].double(), scores.exp().sum().log2(), atol=1e-6)


def test_scores_far_from_zero_do_not_overflow() -> None:
    parts = [part.detach() * 100 for part in problem(1, 20, 2)]
    assert relative_error(mla_attention(*parts, SCALE), exact(parts, None)[0]) < 1e-5


def test_starts_and_ends_of_documents() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [3, 4, 5, 5, -1, -1, -1]])
    starts = document_starts(segments)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5, 5], [0, 1, 2, 2, 4, 4, 4]]
    assert document_ends(starts).dtype == torch.int32
    assert document_ends(starts).tolist() == [[2, 2, 5, 5, 5, 7, 7], [1, 2, 4, 4, 7, 7, 7]]
    assert document_starts(segments[:, :0]).shape == (2, 0)
    with pytest.raises(ValueError, match=r"segments have shape \(7,\)"):
        document_starts(segments[0])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_surface(bad, part) -> None:
    parts = problem(1, 9, 2)
    with torch.no_grad():
        parts[part][0, 4] = bad
    out = mla_attention(*parts, SCALE)
    assert out[0, 4].isnan().all()
    assert not out[0, :4].isnan().any() or part == 1  # 0 times a value that is NaN is NaN
    assert all(grad.isnan().any() for grad in torch.autograd.grad(out.sum(), parts))


@pytest.mark.parametrize("part", [1, 2])
def test_scores_of_minus_infinity_surface_in_the_gradient_of_the_query(part) -> None:
    parts = [torch.ones_like(leaf).requires_grad_() for leaf in problem(1, 9, 1)]
    with torch.no_grad():
        parts[part].view(9, -1)[4, 0] = -torch.inf
    out = mla_attention(*parts, SCALE)
    assert out.isfinite().all()  # a weight of 0
    assert torch.autograd.grad(out.sum(), parts[0])[0][0, 4:].isnan().any(dim=-1).all()


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_attend_to(shape) -> None:
    parts = problem(*shape)
    out = mla_attention(*parts, SCALE)
    out.sum().backward()
    assert out.shape == (*shape, 14)
    assert all(not part.grad.any() for part in parts)


def test_what_is_not_contiguous_is_the_same() -> None:
    parts = problem(2, 9, 3)
    turned = [part.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for part in parts]
    results = []
    for leaves in (parts, turned):
        out = mla_attention(*leaves, SCALE)
        grad = torch.ones(14, 3, 9, 2).permute(3, 2, 1, 0)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_input_is_named() -> None:
    q, key_value, key_rotary = (part.detach() for part in problem(2, 5, 3))
    starts = torch.zeros(2, 5, dtype=torch.int32)
    for arguments in (
        (q[0], key_value, key_rotary),
        (q, key_value[:, :, :2], key_rotary),
        (q, key_value, key_rotary[:, :4]),
        (q[..., :8], key_value, key_rotary),
        (q, key_value[..., :10], key_rotary),
    ):
        with pytest.raises(ValueError, match="they must be"):
            mla_attention(*arguments, SCALE)
    with pytest.raises(TypeError, match=r"type of q is torch\.float64"):
        mla_attention(q.double(), key_value, key_rotary, SCALE)
    with pytest.raises(TypeError, match=r"key_rotary is torch\.bfloat16"):
        mla_attention(q, key_value, key_rotary.bfloat16(), SCALE)
    with pytest.raises(ValueError, match="key_value is on meta"):
        mla_attention(q, key_value.to("meta"), key_rotary, SCALE)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale is"):
            mla_attention(q, key_value, key_rotary, scale)
    for wrong in (starts.long(), starts[:, :4], starts.to("meta")):
        with pytest.raises(ValueError, match="starts are"):
            mla_attention(q, key_value, key_rotary, SCALE, wrong)
    for values in ([0, 2, 2, 3, 3], [0, 1, 0, 0, 0], [-1, 0, 0, 0, 0]):
        wrong = torch.tensor([values, [0] * 5], dtype=torch.int32)
        with pytest.raises(ValueError, match="starts must lie"):
            mla_attention(q, key_value, key_rotary, SCALE, wrong)


@pytest.mark.parametrize("widths", [(129, 64, 128), (128, 65, 128), (128, 64, 129)])
def test_widths_that_no_tile_holds_are_named(widths) -> None:
    parts = [part.detach() for part in problem(1, 2, 1, widths)]
    with pytest.raises(ValueError, match=r"mla_attention: the widths are .* at most \(128, 64, 128\)"):
        attention_triton(*parts, SCALE)


def test_a_gpu_that_the_kernels_do_not_support_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:
        is_cuda = True
        device = torch.device("cuda", 0)

    capability, shared = (8, 9), 227 * 1024
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(mla_tiles.backend, "triton", object())
    monkeypatch.setattr(mla_tiles, "multiprocessors", lambda device: (132, shared))
    with pytest.raises(RuntimeError, match=r"mla_attention: the tensor is on a card, .*\(9, 0\).*227 KiB"):
        mla_tiles.runs_triton("mla_attention", Tensor())
    capability, shared = (12, 0), 99 * 1024
    with pytest.raises(RuntimeError, match="mla_attention: the tensor is on a card"):
        mla_tiles.runs_triton("mla_attention", Tensor())
    capability, shared = (9, 0), 227 * 1024
    assert mla_tiles.runs_triton("mla_attention", Tensor())
    assert not mla_tiles.supported(torch.device("cpu"))


@needs_interpreter
def test_kernels_agree_with_their_references() -> None:
    run_interpreted("interpreted_attention.py")
