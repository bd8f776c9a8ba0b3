"""Cross-entropy that never holds all logits, and the losses of every prediction depth."""

import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import loss
from model.loss import cross_entropy_sum, next_token_losses
from tests.model.tiny import TINY, relative, tiny, tokens
from tests.model.training import Rows, run


@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_linear_cross_entropy_and_its_gradients_are_those_of_torch(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(11, 6, generator=generator).requires_grad_()
    head = torch.randn(9, 6, generator=generator).requires_grad_()
    targets = torch.randint(9, (11,), generator=generator)
    total = cross_entropy_sum(states, head, targets)
    (0.3 * total).backward()
    states64, head64 = (t.detach().double().requires_grad_() for t in (states, head))
    expected = F.cross_entropy(states64 @ head64.t(), targets, reduction="sum")
    (0.3 * expected).backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert relative(states.grad.double(), states64.grad) < 1e-5
    assert relative(head.grad.double(), head64.grad) < 1e-5


def test_no_position_gives_zero_and_zero_gradients():
    states, head = torch.empty(0, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    total = cross_entropy_sum(states, head, torch.empty(0, dtype=torch.long))
    total.backward()
    assert float(total.detach()) == 0.0
    assert not head.grad.any()


def test_measuring_makes_no_gradient(monkeypatch):
    """Half of the work of the loss is its gradient; evaluation must not pay for it."""
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(1) or real(*args, **kwargs))
    states, head = torch.randn(3, 6), torch.randn(9, 6, requires_grad=True)
    with torch.no_grad():
        cross_entropy_sum(states, head, torch.tensor([1, 2, 3]))
    assert not products
    cross_entropy_sum(states, head, torch.tensor([1, 2, 3])).backward()
    assert products


def naive_depth(model, tokens_BT: Tensor, counted_BT: Tensor, depth: int) -> float:
    """Equations 21-24 token by token: -log p summed over the counted targets of a depth (0: the model)."""
    cos, sin = model.rotation(tokens_BT.shape[1])
    total = 0.0
    for row, counted in zip(tokens_BT, counted_BT, strict=True):
        embedded = model.embed_tokens[row][None]
        hidden = embedded
        for layer in model.layers:
            hidden, _ = layer(hidden, cos, sin, None, None)
        norm = model.norm
        for k in range(1, depth + 1):
            module = model.mtp[k - 1]
            keep = len(row) - k
            joined = [
                torch.cat((module.enorm(embedded[0, i + k]), module.hnorm(hidden[0, i]))) for i in range(keep)
            ]
            inputs = torch.stack([module.eh_proj @ one for one in joined])[None]
            hidden, _ = module.block(inputs, cos[:keep], sin[:keep], None, None)
            norm = module.norm
        logits = (norm(hidden) @ model.lm_head.t())[0]
        for i in range(len(row) - 1 - depth):
            if counted[i + depth + 1]:
                total -= float(logits[i].log_softmax(-1)[row[i + depth + 1]])
    return total


@torch.no_grad()
def test_every_depth_predicts_the_token_that_many_places_further_on():
    model = tiny(num_nextn_predict_layers=2).train()
    tokens_BT = tokens(3, 13)
    counted = torch.rand(3, 13, generator=torch.Generator().manual_seed(1)) < 0.7
    losses = next_token_losses(model, model(tokens_BT, mtp=True), tokens_BT, counted)
    for depth, found in enumerate([losses.main, *losses.mtp]):
        assert float(found) == pytest.approx(naive_depth(model, tokens_BT, counted, depth), rel=1e-5), depth
    assert len(losses.mtp) == 2


@torch.no_grad()
def test_the_balance_loss_is_the_sum_over_expert_layers():
    model = tiny().train()
    tokens_BT = tokens(3, 13)
    output = model(tokens_BT, mtp=True)
    losses = next_token_losses(model, output, tokens_BT, torch.ones_like(tokens_BT).bool())
    assert len(output.routings) == 3  # two layers and the prediction module's
    total = sum(float(r.balance_loss) for r in output.routings)
    assert float(losses.balance) == pytest.approx(total, rel=1e-6)


def test_the_step_divides_every_depth_by_the_targets_of_the_first(tmp_path):
    """L_MTP's divisor is T, not the T - k terms there are; lambda/D weighs the sum over depths."""
    source = Rows(4, 13, counted=0.7)
    model = tiny(num_nextn_predict_layers=2)
    run(tmp_path, model, source, steps=1, mtp_weight=0.3, lr=0.0)
    figures = json.loads((tmp_path / "log.jsonl").read_text())
    batch = source.stream(0, 4)
    tokens_BT, counted = batch["tokens"].long(), batch["loss"].bool()
    targets = int(counted[:, 1:].sum())
    with torch.no_grad():
        sums = [naive_depth(model, tokens_BT, counted, depth) for depth in range(3)]
    assert figures["loss"] == pytest.approx(sums[0] / targets, rel=1e-5)
    assert figures["mtp_loss"] == pytest.approx((sums[1] + sums[2]) / 2 / targets, rel=1e-5)


@torch.no_grad()
def test_with_segments_nothing_is_predicted_across_a_boundary():
    model = tiny().train()
    tokens_BT = tokens(1, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    counted = torch.ones_like(tokens_BT).bool()
    found = next_token_losses(model, model(tokens_BT, segments, mtp=True), tokens_BT, counted, segments)
    parts = [(tokens_BT[:, :5], counted[:, :5]), (tokens_BT[:, 5:], counted[:, 5:])]
    for depth, loss_ in enumerate([found.main, *found.mtp]):
        alone = sum(naive_depth(model, *part, depth) for part in parts)
        assert float(loss_) == pytest.approx(alone, rel=1e-4), depth


def test_untrained_model_is_as_good_as_guessing():
    model = tiny(initializer_range=0.006)
    tokens_BT = tokens(4, 30)
    counted = torch.ones_like(tokens_BT).bool()
    losses = next_token_losses(model, model(tokens_BT, mtp=True), tokens_BT, counted)
    for depth, total in enumerate([losses.main, *losses.mtp]):
        assert float(total.detach()) / (4 * (29 - depth)) == pytest.approx(
            math.log(TINY.vocab_size), abs=0.01
        )
