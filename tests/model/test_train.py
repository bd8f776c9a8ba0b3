"""The training loop: resuming, micro-batches, divergence, what a step counts."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from infra.checkpoint import Checkpoints
from infra.errors import HeadwaterError
from model.allocations import allocations
from model.ema import EMA
from model.guard import GuardConfig
from model.recompute import recomputing
from model.train import TrainingDiverged, held_out_loss
from tests.model.tiny import TINY, relative, tiny, tokens
from tests.model.training import Rows, Shelf, run

STEPS = 7


class Killed(BaseException):
    """Stands for the end of the process: nothing in the loop may catch it."""


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def figures(folder) -> list[dict]:
    """The log without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def settings(folder, optimizer: str) -> dict:
    """Everything on: prediction depths, masked documents, accumulation, bias updates, held-out loss."""
    return {
        "source": Rows(13, 24, counted=0.8, documents=2),
        "steps": STEPS,
        "rows": 5,
        "lr": 5e-3,
        "optimizer": optimizer,
        "bias_speed": 0.01,
        "store": Checkpoints(folder / "checkpoints"),
        "micro_rows": 2,
        "mask_documents": True,
        "checkpoint_every": 2,
        "watch": lambda position: {"watched": float(position.rows)},
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("at", [1, 4, 5], ids=["before any checkpoint", "on a checkpoint", "after one"])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, optimizer, at):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = tiny()
    end = run(whole, expected, **settings(whole, optimizer))

    def die(position, figures):
        if position.step == at:
            raise Killed

    with pytest.raises(Killed):
        run(killed, tiny(), progress=die, **settings(killed, optimizer))
    # What was in memory is gone; a torn line is what a process leaves that dies while it writes.
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    # Whatever the new process starts with, a checkpoint overwrites it.
    found = tiny(seed=0 if at == 1 else 99)
    reached = []
    assert (
        run(killed, found, progress=lambda p, f: reached.append(p.step), **settings(killed, optimizer)) == end
    )
    assert reached == list(range({1: 0, 4: 4, 5: 4}[at] + 1, STEPS + 1))
    assert same(expected, found)
    assert figures(killed) == figures(whole)
    assert [line["step"] for line in figures(whole)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in figures(whole) if "watched" in line] == [2, 4, 6, 7]


def test_a_process_killed_while_it_saves_leaves_no_hole_in_the_log(tmp_path):
    class Dying(Shelf):
        def save(self, step, tensors, state):
            super().save(step, tensors, state)
            if step == 4 and len(self.saved) == 2:
                raise Killed

    store, model = Dying(), tiny()
    with pytest.raises(Killed):
        run(tmp_path, model, Rows(8, 16), steps=6, store=store, checkpoint_every=2)
    run(tmp_path, tiny(), Rows(8, 16), steps=6, store=store, checkpoint_every=2)
    assert [line["step"] for line in figures(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_started_again_does_nothing(tmp_path):
    store, model = Shelf(), tiny()
    end = run(tmp_path, model, Rows(8, 16), steps=3, store=store)
    log = (tmp_path / "log.jsonl").read_text()
    again = tiny(seed=5)
    assert run(tmp_path, again, Rows(8, 16), steps=3, store=store) == end
    assert same(model, again)
    assert (tmp_path / "log.jsonl").read_text() == log
    assert [step for step, _, _ in store.saved] == [3]


def test_a_log_without_a_checkpoint_is_begun_anew(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    run(tmp_path, tiny(), Rows(8, 16), steps=2)
    assert [line["step"] for line in figures(tmp_path)] == [1, 2]
    assert "loss" in figures(tmp_path)[0]


def gradients(folder, monkeypatch, **loop) -> tuple[dict[str, torch.Tensor], dict]:
    """Gradients of one step before they are clipped, and its log line."""
    found = {}
    model = tiny()
    monkeypatch.setattr(
        "model.optim.build.Optimizer.clip",
        lambda self: found.update({name: p.grad.clone() for name, p in self.named}) or 0.0,
    )
    run(folder, model, Rows(9, 20, counted=0.6, documents=2), steps=1, rows=7, bias_speed=0.01, **loop)
    return found | dict(model.named_buffers()), figures(folder)[0]


@pytest.mark.parametrize("mask_documents", [False, True])
def test_micro_batches_accumulate_the_gradients_of_the_whole_batch(tmp_path, monkeypatch, mask_documents):
    common = {"mask_documents": mask_documents, "balance_weight": 0.1}
    whole, line = gradients(tmp_path, monkeypatch, micro_rows=7, **common)
    for micro_rows in (1, 3):
        parts, other = gradients(tmp_path, monkeypatch, micro_rows=micro_rows, **common)
        assert set(parts) == set(whole)
        for name, gradient in whole.items():
            assert relative(parts[name], gradient) < 1e-4, name
        for key in ("loss", "mtp_loss", "balance", "max_violation"):
            assert other[key] == pytest.approx(line[key], rel=1e-5), key


def test_the_balance_loss_is_weighted_in(tmp_path, monkeypatch):
    without, _ = gradients(tmp_path, monkeypatch, balance_weight=0.0)
    little, _ = gradients(tmp_path, monkeypatch, balance_weight=0.1)
    much, _ = gradients(tmp_path, monkeypatch, balance_weight=0.2)
    gate = "layers.1.mlp.gate.weight"
    assert relative(little[gate], without[gate]) > 1e-2
    assert relative(much[gate] - without[gate], 2 * (little[gate] - without[gate])) < 1e-2


def test_documents_are_masked_on_request_only(tmp_path, monkeypatch):
    """A document's loss depends on its neighbours in pretraining and does not in fine-tuning."""
    free, _ = gradients(tmp_path, monkeypatch, mask_documents=False)
    masked, _ = gradients(tmp_path, monkeypatch, mask_documents=True)
    assert relative(free["embed_tokens"], masked["embed_tokens"]) > 1e-2


def test_a_sample_s_first_token_is_no_target_when_samples_are_masked(tmp_path):
    source = Rows(4, 16, documents=2)
    run(tmp_path, tiny(), source, steps=1, lr=0.0, mask_documents=True, mtp_weight=0.0)
    batch = source.stream(0, 4)
    halves = batch["tokens"].long().view(8, 8)
    model = tiny().eval()
    with torch.no_grad():
        logits = model.logits(model(halves).states_BTD[0])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), halves[:, 1:].flatten())
    assert figures(tmp_path)[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_biases_move_by_the_speed_against_the_load_and_only_while_it_is_positive(tmp_path):
    model = tiny(bias=0.0)
    run(tmp_path, model, Rows(4, 16), steps=1, lr=0.0, bias_speed=0.5)
    for gate in model.gates():
        assert set(gate.e_score_correction_bias.tolist()) <= {-0.5, 0.0, 0.5}
        assert gate.e_score_correction_bias.any()
    still = tiny(bias=0.0)
    run(tmp_path, still, Rows(4, 16), steps=2, bias_speed=0.0)
    assert not any(gate.e_score_correction_bias.any() for gate in still.gates())
    # Without prediction modules in the step, their gates have no load and stay.
    ahead = tiny(bias=0.0)
    run(tmp_path, ahead, Rows(4, 16), steps=1, bias_speed=0.5, mtp_weight=0.0)
    assert [bool(g.e_score_correction_bias.any()) for g in ahead.gates()] == [True, True, False]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tmp_path, optimizer):
    run(tmp_path, tiny(), Rows(4, 24), steps=30, lr=0.01, optimizer=optimizer, bias_speed=0.001)
    losses = [line["loss"] for line in figures(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]
    ahead = [line["mtp_loss"] for line in figures(tmp_path)]
    assert ahead[-1] < 0.7 * ahead[0]


class Spoiled(Rows):
    """Rows from place `bad` on drive the loss to a number that is none, until place `good`."""

    def __init__(self, model: torch.nn.Module, bad: int, good: int) -> None:
        super().__init__(64, 16)
        self.model, self.bad, self.good = model, bad, good

    def stream(self, start, count):
        with torch.no_grad():
            if self.bad <= start < self.good:
                self.model.layers[1].mlp.gate.weight.fill_(math.nan)
        return super().stream(start, count)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_that_went_wrong_goes_back_to_its_checkpoint_and_past_the_bad_rows(tmp_path):
    model, store = tiny(), Shelf()
    end = run(tmp_path, model, Spoiled(model, 12, 16), steps=6, store=store, checkpoint_every=2)
    # Steps 0 to 2 read rows 0 to 12; the weights are spoilt with the next batch, which three tries leave out.
    assert (end.step, end.tokens, end.guard["rollbacks"]) == (6, 6 * 4 * 16, 1)
    assert end.rows == 6 * 4 + (1 + 3) * 4 - 4 + 4
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    told = [line for line in lines(tmp_path) if "skipped" in line]
    assert [line["step"] for line in told] == [3, 3, 3]
    assert "loss nan" in told[0]["skipped"]
    # Every step that counts is in the log once more after going back, and losses go on from there.
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 3, 4, 5, 6]


def test_a_run_that_goes_wrong_again_and_again_stops_before_it_is_saved(tmp_path):
    model, store = tiny(), Shelf()
    with pytest.raises(TrainingDiverged, match=r"step 2: loss nan.* after 2 returns .*Lower") as caught:
        run(tmp_path, model, Spoiled(model, 8, 10**6), steps=6, store=store, checkpoint_every=1)
    assert isinstance(caught.value, HeadwaterError)
    assert [step for step, _, _ in store.saved] == [1, 2]
    assert all(torch.isfinite(t).all() for _, tensors, _ in store.saved for t in tensors.values())


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    model = tiny()
    with pytest.raises(TrainingDiverged, match="step 0"):
        run(tmp_path, model, Spoiled(model, 0, 10**6), steps=6)


def test_a_loss_that_stands_out_is_left_out(tmp_path):
    class Odd(Rows):
        def stream(self, start, count):
            batch = super().stream(start, count)
            if start == 160:
                batch["tokens"] = torch.randint(TINY.vocab_size, batch["tokens"].shape).int()
            return batch

    guard = GuardConfig(spike=5.0, window=8)
    end = run(tmp_path, tiny(), Odd(4, 24), steps=45, lr=0.01, guard=guard)
    skipped = [line for line in lines(tmp_path) if "skipped" in line]
    assert [line["step"] for line in skipped] == [40]
    assert "deviation" in skipped[0]["skipped"]
    assert (end.rows, end.tokens) == (46 * 4, 45 * 4 * 24)
    assert end.guard["bad"] == 0


def test_an_average_of_the_weights_travels_with_the_run(tmp_path):
    settings = {"steps": 6, "optimizer": "adamw", "lr": 0.01, "checkpoint_every": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    model = tiny()
    average = EMA(model, 0.8)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    def follow(position, _):
        for name, p in model.named_parameters():
            expected[name].lerp_(p.detach(), 0.2)

    run(whole, model, Rows(8, 16), progress=follow, ema=average, **settings)
    for name, value in average.tensors().items():
        assert relative(value, expected[name]) < 1e-6, name
    stopped, shelf = tiny(), Shelf()

    def die(position, _):
        if position.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(cut, stopped, Rows(8, 16), store=shelf, progress=die, ema=EMA(stopped, 0.8), **settings)
    resumed = tiny(seed=4)
    again = EMA(resumed, 0.8)
    run(cut, resumed, Rows(8, 16), store=shelf, ema=again, **settings)
    assert all(torch.equal(again.tensors()[name], value) for name, value in average.tensors().items())
    before = {name: p.detach().clone() for name, p in resumed.named_parameters()}
    with again.in_place():
        assert torch.equal(resumed.lm_head, average.tensors()["lm_head"])
    assert all(torch.equal(p, before[name]) for name, p in resumed.named_parameters())


def test_recomputing_changes_no_bit_and_holds_less(tmp_path):
    plain, again = tiny(), tiny()
    settings = {"steps": 3, "optimizer": "muon", "lr": 0.01, "micro_rows": 2, "mask_documents": True}
    run(tmp_path, plain, Rows(9, 20, documents=2), **settings)
    run(tmp_path, again, Rows(9, 20, documents=2), recompute=True, lanes=2, **settings)
    assert same(plain, again)

    def held(recompute: bool) -> int:
        """Bytes that a forward pass keeps for the backward pass."""
        model, batch = tiny(num_attention_heads=8).train(), tokens(4, 32)

        def forward():
            with recomputing(recompute):
                return model(batch, mtp=True)

        forward()  # tables that are made once
        return allocations(forward)[1]

    assert held(True) < 0.7 * held(False)


def test_held_out_loss_is_the_mean_over_counted_tokens_of_the_first_rows():
    model, source = tiny(), Rows(9, 20, counted=0.5)
    found, targets = held_out_loss(model, source, rows=7, batch_rows=3)
    batch = source.stream(0, 7)
    tokens_BT, counted = batch["tokens"].long(), batch["loss"].bool()[:, 1:]
    with torch.no_grad():
        logits = model.logits(model(tokens_BT).states_BTD[0])[:, :-1]
    expected = F.cross_entropy(logits[counted], tokens_BT[:, 1:][counted])
    assert targets == int(counted.sum())
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert held_out_loss(model, Rows(2, 20, counted=0.0), rows=2) == (0.0, 0)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_other_precisions_train(tmp_path, precision):
    run(tmp_path, tiny(precision=precision), Rows(4, 24), steps=12, lr=0.01)
    losses = [line["loss"] for line in figures(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
