"""Where a GPU would run the attention kernels: the same calls, with the kernels' references on the CPU."""

from collections.abc import Callable

import pytest
import torch

from kernels.attention import mla_attention, mla_decode
from model import attention, mla
from model.allocations import allocations
from model.attention import boundaries, boundary_mask, shortened
from model.engine import reading
from model.engine.engine import Engine
from model.recompute import recomputing
from model.transformer import Transformer
from tests.model.test_engine import PROMPTS, WAYS, ask, name, scored
from tests.model.tiny import TINY, relative, tiny, tokens


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every place takes the kernels; the list says which were called."""
    called: list[str] = []
    for module in (attention, mla, reading):
        monkeypatch.setattr(module, "fused", lambda device: True)
    for module, function in ((mla_attention, "mla_attention"), (mla_decode, "mla_decode")):
        monkeypatch.setattr(module, function, _spied(getattr(module, function), called))
    return called


def _spied(function: Callable[..., torch.Tensor], called: list[str]) -> Callable[..., torch.Tensor]:
    def spy(*arguments, **options) -> torch.Tensor:
        called.append(function.__name__)
        return function(*arguments, **options)

    return spy


def trained(model: Transformer, segments: torch.Tensor | None, recompute: bool = False) -> list[torch.Tensor]:
    """States of every depth, and gradients of everything."""
    model.zero_grad()
    with recomputing(recompute):
        states = model(tokens(2, 21), segments, mtp=True).states_BTD
        loss = sum((state * torch.linspace(-1, 1, TINY.hidden_size)).square().sum() for state in states)
    loss.backward()
    return [*states, *(p.grad for p in model.parameters() if p.grad is not None)]


SEGMENTS = torch.tensor([[0] * 5 + [1] * 9 + [-1] * 7, [0] * 1 + [1] * 20])


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["packed", "documents"])
def test_training_is_that_of_the_unfused_operator(segments, request: pytest.FixtureRequest) -> None:
    expected = trained(tiny(), segments)
    called = request.getfixturevalue("fused")
    found = trained(tiny(), segments)
    assert called == ["mla_attention"] * 4  # three layers and a depth
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 2e-5
    again = trained(tiny(), segments, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_expanded_keys_and_values_are_not_held_when_recomputing(fused) -> None:
    model = tiny(num_attention_heads=16).train()

    def held(recompute: bool) -> int:
        """Bytes that a forward pass keeps for the backward pass."""

        def forward():
            with recomputing(recompute):
                return model(tokens(2, 32))

        forward()  # tables that are made once
        return allocations(forward)[1]

    assert held(True) < 0.5 * held(False)


def test_boundaries_take_the_form_of_the_device(request: pytest.FixtureRequest) -> None:
    mask = boundaries(SEGMENTS)
    assert torch.equal(mask, boundary_mask(SEGMENTS))
    assert torch.equal(shortened(mask, 6), boundary_mask(SEGMENTS[:, :6]))
    request.getfixturevalue("fused")
    starts = boundaries(SEGMENTS)
    assert starts[0].tolist() == [0] * 5 + [5] * 9 + [14] * 7
    assert torch.equal(shortened(starts, 6), boundaries(SEGMENTS[:, :6]))


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_decoding_is_that_of_the_forward_pass(options, fused) -> None:
    model = tiny()
    answers = Engine(model, [TINY.vocab_size], **options).generate(ask(max_tokens=20, temperature=0.0))
    assert "mla_decode" in fused
    fused.clear()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = scored(model, prompt, answer.tokens)
        assert expected.argmax(-1).tolist() == answer.tokens
        assert answer.log_probs == pytest.approx(expected.amax(-1).tolist(), abs=1e-5)
