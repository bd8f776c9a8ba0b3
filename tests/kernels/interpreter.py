"""Run a script of this folder under Triton's CPU interpreter, in its own process: it is chosen at import."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of Triton before 3.7 does not run with NumPy from 2.4 on"
    return ""


needs_interpreter = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs here")


def run_interpreted(script: str, *arguments: str) -> None:
    """Run `script` and assert that it found the kernels and their references to agree."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", f"tests.kernels.{script.removesuffix('.py')}", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreted kernels agree" in done.stdout
