"""The experiments: what they compute, what they find, and that the command writes it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels.experiments import __main__ as command
from kernels.experiments import accumulation, outliers
from kernels.formats.quantize import dequantize, quantize_tiles


def test_a_scale_a_tile_is_the_recipe() -> None:
    x = outliers.activation("wide", 0)
    assert torch.equal(outliers.quantized(x, "tile"), dequantize(quantize_tiles(x)))


def test_coarse_scales_reach_as_far_as_they_say() -> None:
    x = torch.ones(2, 256)
    x[0, 0] = 448.0 * 2**20  # every value that shares its scale is flushed
    for scales, flushed in (("tensor", 511), ("token", 255), ("tile", 127)):
        found = outliers.quantized(x, scales)
        assert int((found == 0).sum()) == flushed
        assert torch.equal(found[found != 0], x[found != 0])


def test_unknown_scales_and_ragged_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of tensor, token, tile"):
        outliers.quantized(torch.ones(1, 128), "row")
    with pytest.raises(ValueError, match="100 channels"):
        outliers.quantized(torch.ones(1, 100), "tile")


def test_large_outliers_damage_what_shares_their_scale() -> None:
    losses = {loss.scales: loss for loss in outliers.measure(sizes=(1e4,)) if loss.data == "normal"}
    assert losses["tensor"].damaged > 0.1 > 0.005 > losses["token"].damaged > 5 * losses["tile"].damaged
    # Below largest / 458,752 a value is zero: |x| < 0.0218 for an outlier of 10,000.
    assert losses["tensor"].flushed == pytest.approx(0.0174, abs=0.002)


def test_outliers_of_the_others_size_cost_nothing() -> None:
    for loss in outliers.measure(sizes=(1.0,)):
        if loss.data == "normal":
            assert loss.damaged < 1e-4
            assert loss.error == pytest.approx(0.0225, abs=0.001)


def test_sums_that_are_promoted_keep_their_error_whatever_their_length() -> None:
    losses = accumulation.measure(512, (128, 2048), (128, 512), size=16)
    error = {(loss.data, loss.core, loss.length, loss.interval): loss.frobenius for loss in losses}
    for data in accumulation.DATA:
        for core in accumulation.CORES:
            assert error[data, core, 2048, 128] < 1.2 * error[data, core, 128, 128]
            assert error[data, core, 2048, 2048] > 4 * error[data, core, 2048, 128]


def test_the_error_of_a_sum_is_that_of_its_register() -> None:
    # One product of 2**14 and then ones: each is lost.
    a = torch.zeros(1, 64)
    a[0, 0], a[0, 32] = 128.0, 1.0
    codes = a.to(torch.float8_e4m3fn)
    exact = codes.double() @ codes.double().t()
    found = accumulation._loss("positive", "apart", accumulation.HOPPER, codes, codes, 64, exact)
    assert found.largest == pytest.approx(1 / (2**14 + 1))
    whole = accumulation._loss("positive", "apart", accumulation.HOPPER, codes, codes, 32, exact)
    assert whole.largest == whole.frobenius == 0


def test_a_limit_that_is_broken_is_said_to_be() -> None:
    losses = accumulation.measure(256, (128,), (128, 256), size=4)
    assert accumulation.rows(losses)[-1].holds
    broken = [replace(loss, frobenius=0.01) for loss in losses]
    assert accumulation.rows(broken)[-1].holds is False


def test_the_command_writes_figures_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outliers, "measure", partial(outliers.measure, sizes=(1.0, 1e4)))
    monkeypatch.setattr(
        accumulation, "measure", partial(accumulation.measure, 256, (128, 512), (64, 128, 256), size=4)
    )
    assert command.main(["--folder", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    for name in ("outliers", "accumulation"):
        report = json.loads((tmp_path / "new" / f"{name}.json").read_text())
        assert report["machine"]["torch"] == torch.__version__
        assert all(row["name"] in shown for row in report["rows"])
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert command.main(["--only", "outliers"]) == 0
    assert "register" not in capsys.readouterr().out
