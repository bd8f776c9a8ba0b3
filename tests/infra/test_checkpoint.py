"""Checkpoints: exact, the last two kept, what is not whole skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from infra.checkpoint import Checkpoints
from infra.errors import ConfigError, HeadwaterError


def test_every_kind_of_tensor_comes_back_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4, 6, generator=generator)
    tensors = {
        "float32": base,
        "transposed": base.T,
        "tied": base,
        "slice": base[:, 1:3],
        "bfloat16": base.bfloat16(),
        "float64": base.double() / 3,
        "float8": base.to(torch.float8_e4m3fn),
        "int64": torch.tensor([-(2**62), 2**62]),
        "bool": base > 0,
        "rng": generator.get_state(),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "grad": torch.nn.Parameter(base.clone()),
    }
    state = {"step": 7, "rate": 0.1 + 0.2, "seen": 2**60, "names": ["a"], "loader": {"epoch": 1}}
    Checkpoints(tmp_path).save(7, tensors, state)
    step, loaded, found = Checkpoints(tmp_path).latest()
    assert (step, found) == (7, state)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(
            loaded[name].view(torch.uint8) if name == "float8" else loaded[name],
            tensor.view(torch.uint8) if name == "float8" else tensor.detach(),
        ), name


def filled(folder: Path, log: list[str]) -> Checkpoints:
    checkpoints = Checkpoints(folder, log=log.append)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.full((64,), float(step))}, {"at": step})
    return checkpoints


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".step-0000000001.safetensors.tmp-1").write_bytes(b"left by a killed try")
    checkpoints = filled(tmp_path, [])
    assert checkpoints.steps() == [2, 3]
    assert len(list(tmp_path.iterdir())) == 4
    assert checkpoints.latest().tensors["x"][0] == 3


def torn_tensors(newest: Path) -> None:
    newest.write_bytes(newest.read_bytes()[:-10])


def flipped_tensor_byte(newest: Path) -> None:
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)


def missing_tensors(newest: Path) -> None:
    newest.unlink()


def torn_marker(newest: Path) -> None:
    newest.with_suffix(".json").write_bytes(newest.with_suffix(".json").read_bytes()[:20])


def empty_marker(newest: Path) -> None:
    newest.with_suffix(".json").write_bytes(b"")


def marker_of_another_shape(newest: Path) -> None:
    newest.with_suffix(".json").write_bytes(b"[]")


def changed_state(newest: Path) -> None:
    marker = json.loads(newest.with_suffix(".json").read_bytes())
    marker["state"]["at"] = 99
    newest.with_suffix(".json").write_text(json.dumps(marker))


@pytest.mark.parametrize(
    "damage",
    [
        torn_tensors,
        flipped_tensor_byte,
        missing_tensors,
        torn_marker,
        empty_marker,
        marker_of_another_shape,
        changed_state,
    ],
)
def test_a_damaged_one_is_skipped_with_a_line_in_the_log(damage, tmp_path: Path) -> None:
    log: list[str] = []
    checkpoints = filled(tmp_path, log)
    damage(tmp_path / "step-0000000003.safetensors")
    found = checkpoints.latest()
    assert (found.step, found.state) == (2, {"at": 2})
    assert len(log) == 1
    assert log[0].startswith("checkpoint step-0000000003.safetensors is skipped: ")


def test_a_missing_marker_means_it_does_not_count(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [])
    (tmp_path / "step-0000000003.json").unlink()
    assert checkpoints.latest().step == 2


def test_nothing_there(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "new").latest() is None


def test_bad_state_and_bad_keep_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [])
    with pytest.raises(ConfigError, match=r"loss\[1\]: nan"):
        checkpoints.save(4, {}, {"loss": [1.0, float("nan")]})
    assert checkpoints.steps() == [2, 3]
    with pytest.raises(HeadwaterError, match="keep must be 1 or more"):
        Checkpoints(tmp_path, keep=0)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [])
    checkpoints.save(3, {"x": torch.zeros(1)}, {"at": "again"})
    assert checkpoints.latest().state == {"at": "again"}
