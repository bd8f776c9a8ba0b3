"""Fine-tuning: what counts as a target, who sees whom, in what order, and that a stopped run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.chat import ASSISTANT, BOS, EOS, ChatTokenizer
from infra.checkpoint import Checkpoints
from infra.errors import HeadwaterError
from model.loss import next_token_losses
from model.optim.build import Optimizer, OptimizerConfig
from model.transformer import Transformer
from post_training.sft import Conversation, PackedSamples, SFTConfig, drop_prompts, fine_tune
from post_training.tasks.problem import SYSTEM
from tests.post_training.small import Stopped, ignore, reversal, same_weights, small_model, stop_at

LENGTH = 96


def conversations(count: int = 30) -> list[Conversation]:
    problems = [reversal(str(1000 + 37 * i)) for i in range(count)]
    return [
        Conversation(p.prompt, p.thought if i % 3 else "", p.boxed, SYSTEM if i % 2 else "")
        for i, p in enumerate(problems)
    ]


@pytest.fixture
def packed(tokenizer: ChatTokenizer) -> PackedSamples:
    return PackedSamples(tokenizer, conversations(), LENGTH, seed=0)


def pieces(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, loss) of every sample in a batch."""
    found = []
    for tokens, segments, loss in zip(batch["tokens"], batch["segments"], batch["loss"], strict=True):
        for segment in range(int(segments.max()) + 1):
            mine = segments == segment
            found.append((tokens[mine].tolist(), loss[mine].tolist()))
        assert not loss[segments < 0].any()
    return found


def test_only_responses_are_targets(packed: PackedSamples, tokenizer: ChatTokenizer) -> None:
    found = pieces(packed.stream(0, packed.count))
    wanted = sorted(
        tokenizer.prompt_ids(c.prompt, c.system) + tokenizer.response_ids(c.thought, c.answer)
        for c in conversations()
    )
    assert sorted(ids for ids, _ in found) == wanted
    for ids, loss in found:
        assert (ids[0], ids[-1]) == (BOS, EOS)
        response = ids.index(ASSISTANT) + 1
        assert loss == [0] * response + [1] * (len(ids) - response)
    assert packed.left_out == 0


def test_too_long_samples_are_left_out_and_counted(tokenizer: ChatTokenizer) -> None:
    long = Conversation("Sort.", "1 " * 200, "\\boxed{1}")
    packed = PackedSamples(tokenizer, [*conversations(5), long, long], LENGTH, seed=0)
    assert packed.left_out == 2
    assert len(pieces(packed.stream(0, packed.count))) == 5
    with pytest.raises(HeadwaterError, match=r"none of the 1 fine-tuning samples fits a row of 96 tokens"):
        PackedSamples(tokenizer, [long], LENGTH, seed=0)


def test_a_sample_of_exactly_one_row_fits(tokenizer: ChatTokenizer) -> None:
    one = conversations(1)[0]
    length = len(tokenizer.prompt_ids(one.prompt, one.system)) + len(tokenizer.response_ids("", one.answer))
    assert PackedSamples(tokenizer, [one], length, seed=0).left_out == 0
    with pytest.raises(HeadwaterError, match="fits a row"):
        PackedSamples(tokenizer, [one], length - 1, seed=0)


def row_keys(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch["tokens"].tolist()]


def test_order_is_a_function_of_place_and_seed(packed: PackedSamples, tokenizer: ChatTokenizer) -> None:
    n = packed.count
    assert n > 3
    all_rows = row_keys(packed.stream(0, 3 * n))
    epochs = [all_rows[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]
    again = PackedSamples(tokenizer, conversations(), LENGTH, seed=0)
    for start, count in [(0, 1), (n - 1, 2), (n, n), (2 * n - 2, n + 1)]:
        assert row_keys(again.stream(start, count)) == all_rows[start : start + count]
    other = PackedSamples(tokenizer, conversations(), LENGTH, seed=1)
    assert row_keys(other.stream(0, n)) != epochs[0]


def sample_loss(model: Transformer, row: dict[str, Tensor], segment: int) -> Tensor:
    """Summed loss of one sample's response inside its packed row."""
    mine = row["segments"] == segment
    counted = row["loss"].bool() & mine
    output = model(row["tokens"], row["segments"])
    return next_token_losses(model, output, row["tokens"], counted, row["segments"]).main


def test_samples_of_a_row_do_not_see_each_other(packed: PackedSamples) -> None:
    model = small_model()
    row = next(r for i in range(packed.count) if int((r := packed.stream(i, 1))["segments"].max()) >= 1)
    second = row["segments"] == 1
    ids = row["tokens"][second]
    alone = {
        "tokens": ids[None],
        "segments": torch.zeros_like(ids)[None],
        "loss": row["loss"][second][None],
    }
    disturbed = {**row, "tokens": torch.where(second, row["tokens"], (row["tokens"] + 1) % 300 + 10)}
    assert not torch.equal(disturbed["tokens"], row["tokens"])
    gradients = []
    for batch, segment in ((row, 1), (disturbed, 1), (alone, 0)):
        model.zero_grad()
        sample_loss(model, batch, segment).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    packed_in, company, by_itself = gradients
    largest = max(float(g.abs().max()) for g in by_itself.values())
    for name, gradient in packed_in.items():
        assert torch.equal(gradient, company[name]), name
        assert float((gradient - by_itself[name]).abs().max()) < 1e-4 * largest, name
    # Without the mask they do see each other, so that the comparison means something.
    model.zero_grad()
    counted = row["loss"].bool() & second
    output = model(row["tokens"])
    next_token_losses(model, output, row["tokens"], counted).main.backward()
    assert model.embed_tokens.grad is not None
    assert float((model.embed_tokens.grad - by_itself["embed_tokens"]).abs().max()) > 1e-2 * largest


def test_logits_of_a_packed_sample_are_its_own(packed: PackedSamples) -> None:
    model = small_model()
    row = next(r for i in range(packed.count) if int((r := packed.stream(i, 1))["segments"].max()) >= 1)
    with torch.no_grad():
        together = model.logits(model(row["tokens"], row["segments"]).states_BTD[0][0])
        for segment in range(int(row["segments"].max()) + 1):
            mine = row["segments"][0] == segment
            alone = model.logits(model(row["tokens"][:, mine]).states_BTD[0][0])
            torch.testing.assert_close(together[mine], alone, atol=1e-5, rtol=1e-5)


def test_fine_tuning_trains_each_sample_as_if_alone(
    tokenizer: ChatTokenizer, packed: PackedSamples, tmp_path: Path
) -> None:
    model = small_model()
    losses, targets = [], 0
    with torch.no_grad():
        for c in conversations():
            alone = PackedSamples(tokenizer, [c], LENGTH, seed=0)
            losses.append(float(sample_loss(model, alone.stream(0, 1), 0)))
            targets += int(alone.stream(0, 1)["loss"].sum())
    whole = SFTConfig(epochs=1.0, batch_rows=packed.count)
    optimizer = Optimizer(model, OptimizerConfig())
    log = tmp_path / "log.jsonl"
    position = fine_tune(model, optimizer, packed, whole, Checkpoints(tmp_path / "c"), log, ignore)
    assert position.step == 1
    # The loss of the first step is that of the weights before it.
    assert json.loads(log.read_text())["loss"] == pytest.approx(sum(losses) / targets, rel=1e-5)


def test_prompts_are_dropped_from_reasoned_samples_alone() -> None:
    reasoned = [Conversation(f"Reverse {i}.", "1 2", "21", "think") for i in range(1000)]
    others = [Conversation("a", "", "b", "think"), Conversation("a", "t", "b")]
    found = drop_prompts([*reasoned, *others], 0.1, seed=3)
    assert found[1000:] == others
    without = [sample.prompt for sample in found[:1000] if not sample.system]
    assert 70 < len(without) < 130
    assert [replace(sample, system="think") for sample in found[:1000]] == reasoned
    assert drop_prompts(reasoned[::-1], 0.1, seed=3) == found[:1000][::-1]
    assert drop_prompts(reasoned, 0.1, seed=4) != found[:1000]
    assert drop_prompts(reasoned, 0.0, seed=3) == reasoned


def test_steps() -> None:
    assert SFTConfig(epochs=2.0, batch_rows=16).steps(40) == 5
    assert SFTConfig(epochs=0.1, batch_rows=16).steps(3) == 1
    assert SFTConfig(epochs=1.5, batch_rows=4).steps(8) == 3


CONFIG = SFTConfig(epochs=4.0, batch_rows=4, warmup=3, floor=0.2)


def run(packed: PackedSamples, folder: Path, name: str, stop: int = 0) -> tuple[Transformer, list[dict]]:
    """Fine-tune in `folder`; with `stop`, end there and go on with a new model and optimizer."""
    log = folder / "log.jsonl"
    for progress in ([stop_at(stop)] if stop else []) + [ignore]:
        model = small_model()
        optimizer = Optimizer(model, OptimizerConfig(name=name, lr=2e-3, muon_lr=5e-3, weight_decay=0.0))
        checkpoints = Checkpoints(folder / "checkpoints")
        try:
            position = fine_tune(model, optimizer, packed, CONFIG, checkpoints, log, progress, 3)
        except Stopped:
            continue
    assert position.step == CONFIG.steps(packed.count)
    assert position.tokens == position.step * CONFIG.batch_rows * LENGTH
    return model, [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resume_is_bit_exact(packed: PackedSamples, tmp_path: Path, name: str) -> None:
    whole, lines = run(packed, tmp_path / "whole", name)
    # Stopped right at a checkpoint, between two, and before the first one.
    for stop in (3, 5, 2):
        resumed, again = run(packed, tmp_path / f"stopped{stop}", name, stop)
        assert same_weights(whole, resumed)
        assert not same_weights(whole, small_model())
        for line in (*lines, *again):
            line.pop("tokens_per_second", None)
        assert again == lines
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))


def test_loss_falls_along_the_schedule(packed: PackedSamples, tmp_path: Path) -> None:
    model = small_model()
    optimizer = Optimizer(model, OptimizerConfig(name="muon", lr=5e-3, muon_lr=2e-2, weight_decay=0.0))
    config = SFTConfig(epochs=16.0, batch_rows=4, warmup=3, floor=0.2)
    log = tmp_path / "log.jsonl"
    fine_tune(model, optimizer, packed, config, Checkpoints(tmp_path / "c"), log, ignore, 100)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    scales = [line["lr_scale"] for line in lines]
    assert scales[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert max(scales) == 1.0
    assert 0.2 < scales[-1] < 0.22
