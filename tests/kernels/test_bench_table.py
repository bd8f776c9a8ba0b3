"""The table drawn from a file of figures."""

from pathlib import Path

import pytest

from kernels import figures
from kernels.bench import table
from kernels.figures import Row

CASE = "gemm fprop o_proj 4096x7168x16384"
ROWS = [
    Row("ceiling: copy, bytes read and written", "GB/s", 3000.0),
    Row(CASE, "us", 800.0),
    figures.at_least(CASE, "TFLOPS", 1200.0, 1000.0),
    Row(CASE, "of ceiling", 1.5),
    Row(CASE, "TFLOPS", 1200.0, 800.0, "cuBLAS BF16", 1.5, 1.5, holds=True),
    Row(CASE, "TFLOPS", 1200.0, 1300.0, "DeepGEMM", 1200 / 1300, published=1358.0),
    Row("quantize_tiles BF16 4096x7168", "us", 40.25),
    Row("quantize_tiles BF16 4096x7168", "GB/s", 2250.0),
    figures.at_least("quantize_tiles BF16 4096x7168", "of ceiling", 0.75, 0.8),
    Row(
        "quantize_tiles BF16 4096x7168", "GB/s", 2250.0, peer_name="somebody (not available: ImportError: x)"
    ),
]


def written(folder: Path, rows: list[Row]) -> Path:
    figures.write(folder / "figures.json", rows)
    return folder / "figures.json"


def test_a_line_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([str(written(tmp_path, ROWS))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("On ")
    assert f"torch {figures.machine()['torch']}" in lines[0]
    assert lines[4:6] == [
        f"| {CASE} | 800 | 1200 TFLOPS (goal 1000) | 1.50 | "
        "1.50x cuBLAS BF16 at 800 (goal 1.5); 0.92x DeepGEMM at 1300, published 1358 |",
        "| quantize_tiles BF16 4096x7168 | 40.2 | 2250 GB/s | 0.75 (misses 0.8) |  |",
    ]
    assert lines[-1] == "ceiling: copy, bytes read and written 3000 GB/s."


def test_checks_have_their_own_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [figures.at_most("gemm: relative error, FP32", "", error, 1e-3) for error in (2e-4, float("nan"))]
    assert table.main([str(written(tmp_path, rows))]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| gemm: relative error, FP32 | 0.0002 | 0.001 | holds |",
        "| gemm: relative error, FP32 | nan | 0.001 | FAILS |",
    ]


def test_what_failed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows():
        yield ROWS[1]
        raise RuntimeError("out of memory")

    assert table.main([str(written(tmp_path, list(figures.guarded(CASE, rows))))]) == 0
    assert f"{CASE}: RuntimeError: out of memory: FAILED" in capsys.readouterr().out


def test_a_file_without_figures_prints_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([str(written(tmp_path, []))]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no kernel was timed or checked" in printed.err
