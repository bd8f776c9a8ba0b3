"""The lower rooms run on a bare GPU image: torch, triton, numpy and safetensors, and nothing else."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BARE = {"torch", "triton", "numpy", "safetensors"}
IMPORTED_AS = {"pyyaml": "yaml"}

SCRIPT = """
import importlib, pkgutil, sys

blocked, rooms = (argument.split(",") for argument in sys.argv[1:])

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
for room in rooms:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_lower_rooms_import_with_every_other_dependency_blocked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9_-]+", line)[0].lower() for line in listed}
    blocked = {IMPORTED_AS.get(name, name).replace("-", "_") for name in names} - BARE
    assert {"pydantic", "prefect", "datasets", "transformers", "tokenizers", "yaml"} <= blocked
    rooms = ["kernels", "model"]
    if (ROOT / "infra" / "parallel").exists():
        rooms.append("infra.parallel")
    blocked |= {"data", "post_training", "flows"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(sorted(blocked)), ",".join(rooms)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"model.hf", "model.train", "model.engine.engine", "kernels.gemms.gemm"} <= set(
        done.stdout.split()
    )
