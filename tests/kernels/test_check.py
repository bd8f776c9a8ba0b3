"""Every Triton kernel compiled for Hopper: no GPU, but Triton's real compiler in a process of its own."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels import check
from kernels.cases import cases

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.timeout(900),  # minutes of compilation, on all cores
]

# After the command itself, a kernel known to spill: a check that passes it would pass anything.
SCRIPT = """
import dataclasses, sys
from kernels import check
code = check.main(["--json", sys.argv[1]])
large = next(case for case in check.cases() if case.name.startswith("gemm 128x192"))
starved = check.compile_case(dataclasses.replace(large, options={**large.options, "num_warps": 4}))
print("starved kernel:", [row.holds for row in starved.rows()])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("check")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")  # a cached kernel would prove nothing
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder / "check.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "check.json").read_text(encoding="utf-8"))


def test_kernels_compile_for_hopper_within_their_limits(compiled) -> None:
    rows = {row["name"]: row for row in compiled[1]["rows"]}
    assert all(row["holds"] is not False for row in rows.values())
    assert sum(name.endswith("shared memory") for name in rows) == len(list(cases()))
    spills = [row["ours"] for name, row in rows.items() if name.endswith("stack and spills")]
    assert spills == [0] * len(spills)
    # Four instructions of 32 products, then the promotion, spelled out for each piece of a tile.
    wgmma = {name: row["ours"] for name, row in rows.items() if name.endswith("FP8 wgmma")}
    expected = {f"{case.name}: FP8 wgmma": 4 * case.products for case in cases() if case.tensor_core}
    assert wgmma == expected
    assert len(wgmma) == 45
    # The narrow piece of the large tile runs while the wide one is promoted.
    beside = rows["gemm 128x192, b in 128x128, bf16: promotions beside wgmma"]
    assert beside["ours"] > 0
    shared = [row["ours"] for name, row in rows.items() if name.endswith("shared memory")]
    assert max(shared) <= 227 * 1024


def test_a_spilling_kernel_is_found(compiled) -> None:
    assert "starved kernel: [True, False, True, None, True, None, True]" in compiled[0]


def test_the_interpreter_is_refused() -> None:
    """TRITON_INTERPRET replaces kernels by plain functions: nothing would be compiled at all."""
    case = dataclasses.replace(next(check.cases()), kernel=lambda: None)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        check.compile_case(case)
