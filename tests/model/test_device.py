"""Nothing in training or generation assumes the CPU: run on another device, the same figures come out."""

import json
from pathlib import Path

import pytest
import torch

from infra.errors import HeadwaterError
from model.device import pick_device
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.sampling import Sampling
from model.train import Position, held_out_loss
from model.transformer import Transformer
from tests.model.tiny import TINY, tiny
from tests.model.training import Rows, Shelf, run
from tests.other_device import DEVICE, other_device


def test_the_other_device_refuses_tensors_of_both():
    with other_device() as device:
        there = torch.ones(3).to(device)
        assert there.device == DEVICE
        assert (there + 1).device == DEVICE
        assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.cat((there, torch.ones(3)))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


class Stopped(Exception):
    """In place of a killed process."""


def stop(position: Position, figures: dict[str, float]) -> None:
    if position.step == 2:
        raise Stopped


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "muon")])
def test_training_follows_its_model_and_resumes_there(tmp_path, optimizer, precision):
    settings = {
        "source": Rows(13, 24, counted=0.8, documents=2),
        "steps": 3,
        "rows": 4,
        "optimizer": optimizer,
        "bias_speed": 0.01,
        "micro_rows": 2,
        "mask_documents": True,
        "checkpoint_every": 1,
    }
    run(tmp_path, tiny(precision=precision), **settings)
    here = losses(tmp_path)
    with other_device() as device:
        shelf = Shelf()
        with pytest.raises(Stopped):
            run(tmp_path, tiny(precision=precision).to(device), store=shelf, progress=stop, **settings)
        there = tiny(seed=3, precision=precision).to(device)
        run(tmp_path, there, store=shelf, **settings)
    assert there.embed_tokens.device == DEVICE
    # Attention takes another path there, so sums are rounded otherwise.
    assert losses(tmp_path) == pytest.approx(here, rel=1e-5 if precision == "fp32" else 1e-2)


def test_generation_and_held_out_loss_follow_their_model():
    prompts = [(3, 9, 4), (3, 9, 4), (5, 2, 2, 7)]
    requests = [Request(p, Sampling(12, 1.0, top_p=0.9, seed=seed)) for seed, p in enumerate(prompts)]
    here = tiny()

    def answers(model: Transformer) -> list:
        return [
            (c.tokens, c.log_probs)
            for options in ({}, {"drafts": 2}, {"invariant": True}, {"chunk": 2})
            for c in Engine(model, range(5), max_rows=2, **options).generate(requests)
        ]

    expected = answers(here), held_out_loss(here, Rows(5, 20, counted=0.7), 5)
    with other_device() as device:
        there = tiny().to(device)
        found = answers(there), held_out_loss(there, Rows(5, 20, counted=0.7), 5)
    assert [tokens for tokens, _ in found[0]] == [tokens for tokens, _ in expected[0]]
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(HeadwaterError, match="device=cpu"):
        pick_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_to_the_same_bits_twice(tmp_path):
    device = pick_device("cuda")
    runs = [tiny().to(device) for _ in range(2)]
    for model in runs:
        run(
            tmp_path, model, Rows(13, 24, documents=2), 4, store=Shelf(), mask_documents=True, bias_speed=0.01
        )
    for name, value in runs[0].state_dict().items():
        assert torch.equal(runs[1].state_dict()[name], value), name
    cpu = tiny()
    run(tmp_path, cpu, Rows(13, 24, documents=2), 4, store=Shelf(), mask_documents=True, bias_speed=0.01)
    assert (cpu.embed_tokens - runs[0].embed_tokens.cpu()).abs().max() < 1e-3
    requests = [Request((3, 9, 4), Sampling(max_tokens=8, seed=seed)) for seed in range(4)]
    answers = Engine(runs[0], [TINY.vocab_size]).generate(requests)
    assert all(len(answer.tokens) == 8 for answer in answers)
