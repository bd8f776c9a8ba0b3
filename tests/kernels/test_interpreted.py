"""The logic of the Triton kernels by Triton's CPU interpreter, in its own process: it is chosen at import."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None
    and version("triton") < (3, 7)
    and version("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.7 does not run with NumPy from 2.4 on",
)
def test_kernels_agree_with_their_references() -> None:
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreted kernels agree" in done.stdout
