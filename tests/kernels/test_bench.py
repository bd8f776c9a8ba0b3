"""The benchmark command: its form, and that a failed check fails it."""

import json
from pathlib import Path

import pytest
import torch

from kernels import bench, figures

FIELDS = {"name", "unit", "ours", "peer", "peer_name", "ratio", "goal", "published", "holds"}


@pytest.fixture(autouse=True)
def on_a_small_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "CPU_SHAPES", ((16, 32, 64),))


def test_writes_the_one_form_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--json", str(tmp_path / "figures.json")]) == 0
    report = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert set(report) == {"machine", "rows"}
    assert report["machine"]["torch"] == torch.__version__
    assert all(set(row) == FIELDS for row in report["rows"])
    checks = [row for row in report["rows"] if row["goal"] is not None]
    assert [row["holds"] for row in checks] == [True, True]
    timed = [row for row in report["rows"] if row["unit"] == "ms"]
    assert len(timed) == 4
    assert all(row["ratio"] == row["ours"] / row["peer"] for row in timed)
    printed = capsys.readouterr().out
    assert "neither run nor timed" in printed
    assert all(row["name"] in printed for row in report["rows"])


def test_a_wrong_gemm_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    true_gemm = bench.gemm
    monkeypatch.setattr(bench, "gemm", lambda a, b, dtype=torch.float32: true_gemm(a, b, dtype) * 1.01)
    assert bench.main([]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_nan_holds_no_limit() -> None:
    assert not figures.at_most("error", "", float("nan"), 1.0).holds
    assert not figures.at_least("count", "", float("nan"), 1.0).holds
