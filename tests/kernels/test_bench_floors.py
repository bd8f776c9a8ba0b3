"""Bytes, operations and floors of the kernels, and the table of them in the folder's page."""

import json
from pathlib import Path

import pytest

import kernels
from kernels.bench import entries, floors


def named(text: str):
    return next(entry for entry in entries() if str(entry) == text)


def test_a_quantiser_waits_for_memory() -> None:
    """4096 x 7168 values: two bytes in, one out, and an FP32 scale for 128; at 4.8 TB/s."""
    memory, products = floors.floor(named("quantize_tiles BF16"))
    assert memory == pytest.approx((4096 * 7168 * 3 + 4096 * 56 * 4) / 4.8e12)
    assert products == 0


def test_a_gemm_waits_for_the_tensor_cores() -> None:
    memory, products = floors.floor(named("gemm fprop"))
    assert products == pytest.approx(2 * 4096 * 1536 * 7168 / 1979e12)
    assert products > memory


def test_attention_multiplies_in_bf16() -> None:
    """Half of all pairs and the diagonal, 192 + 128 products each, two operations a product."""
    _, products = floors.floor(named("mla_attention BF16"))
    assert products == pytest.approx(128 * 4096 * 4097 / 2 * 320 * 2 / 989.5e12)


def test_the_page_of_the_folder_has_this_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert floors.main(["--json", str(tmp_path / "floors.json")]) == 0
    table = capsys.readouterr().out.strip()
    page = (Path(kernels.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert table in page
    rows = json.loads((tmp_path / "floors.json").read_text())["rows"]
    assert len(rows) == len(table.splitlines()) - 2
