"""The registry: stages found by looking, and cheap to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows import registry
from infra.errors import ConfigError

TOY = Path(__file__).parent / "toy"
STAGE = (
    "from infra.stage import Stage\nfrom infra.config import StageConfig\ndef run(config, context): ...\n{}"
)


def test_every_stage_file_is_a_stage_of_its_name() -> None:
    found = registry.stages()
    assert sorted(found) == sorted(path.stem for path in registry.FOLDER.glob("[a-z]*.py"))
    assert all(name == stage.name for name, stage in found.items())
    assert all(stage.description for stage in found.values())
    for stage in found.values():
        for role, spec in stage.inputs.items():
            assert set(spec.stages) <= set(found), f"{stage.name}.{role} names a stage that does not exist"


def test_finding_all_stages_loads_nothing_heavy() -> None:
    code = (
        "import sys, flows.registry; assert flows.registry.stages()\n"
        "heavy = {'torch', 'prefect', 'datasets', 'tokenizers', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_folders_bring_more_stages() -> None:
    found = registry.stages([TOY])
    assert {"source", "slow"} <= set(found)
    assert registry.stage("slow", [TOY]).run is found["slow"].run
    with pytest.raises(ConfigError, match="no stage named 'slow'"):
        registry.stage("slow")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "exactly one STAGE; this one defines none"),
        ("STAGE = Stage('other', 1, StageConfig, run)", "named 'other'; it must be 'odd'"),
        ("STAGE = Stage('odd', 1, StageConfig, run)\nTWO = STAGE", "exactly one STAGE"),
        ("THE_STAGE = Stage('odd', 1, StageConfig, run)", "THE_STAGE"),
    ],
)
def test_a_file_that_is_no_stage_is_named(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "odd.py").write_text(STAGE.format(body))
    with pytest.raises(ConfigError, match=message) as caught:
        registry.stages([tmp_path])
    assert "odd.py" in str(caught.value)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    taken = next(iter(registry.stages()))
    (tmp_path / f"{taken}.py").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        registry.stages([tmp_path])
