"""Fault points: one registry, used in full, and a death that is real."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from infra import faults
from infra.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
POINT = re.compile(rf"({'|'.join(sorted({point.partition('.')[0] for point in faults.POINTS}))})\.[a-z_]+")


def test_every_point_in_the_code_is_registered_and_every_registered_one_is_used() -> None:
    used = set()
    for room in ("infra", "data", "model", "post_training", "flows"):
        for path in (ROOT / room).rglob("*.py"):
            if path == Path(faults.__file__):
                continue
            for node in ast.walk(ast.parse(path.read_bytes())):
                # Points are passed as plain text, to fault(), torn() and WritePoints().
                if isinstance(node, ast.Call) and getattr(
                    node.func, "attr", getattr(node.func, "id", "")
                ) in (
                    "fault",
                    "torn",
                    "WritePoints",
                ):
                    texts = [one.value for one in node.args if isinstance(one, ast.Constant)]
                    used |= {text for text in texts if isinstance(text, str)}
    assert used == set(faults.POINTS)
    assert len(set(faults.POINTS)) == len(faults.POINTS)
    assert all(POINT.fullmatch(point) for point in faults.POINTS)


def test_unknown_points_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean publish\.before_rename"):
        faults.arm("publish.before_renam")
    with pytest.raises(ConfigError, match="POINT:N"):
        faults.arm_spec("publish.before_rename:x")
    with pytest.raises(ConfigError, match="1 or more"):
        faults.arm("publish.before_rename", 0)


def test_nothing_happens_before_the_hit() -> None:
    faults.arm("payload.before_write", 3)
    try:
        faults.fault("payload.before_write")
        faults.fault("payload.after_write")
        faults.fault("payload.before_write")
        with pytest.raises(ConfigError, match="unregistered fault point"):
            faults.fault("payload.elsewhere")
    finally:
        faults.disarm()
    faults.fault("payload.before_write")
