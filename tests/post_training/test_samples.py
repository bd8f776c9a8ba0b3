"""Samples on disk: what comes back is what was sampled, and it verifies again."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from data.chat import ChatTokenizer
from post_training.samples import read_samples, reverify, sample_row, write_samples
from post_training.sft import Conversation
from post_training.tasks.problem import SYSTEM
from tests.post_training.small import reversal, rollout

PROBLEM = reversal("1234")


def rows(tokenizer: ChatTokenizer) -> list[dict[str, str]]:
    reasoned = rollout(tokenizer, PROBLEM, "</think> 4 3\n2 1", f"\n{PROBLEM.boxed} ", SYSTEM)
    direct = rollout(tokenizer, PROBLEM, "", PROBLEM.boxed)
    assert reasoned.verdict.correct
    return [
        sample_row(tokenizer, reasoned, "reasoned", "abc"),
        sample_row(tokenizer, direct, "concise", "abc"),
    ]


def test_round_trip(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    made = rows(tokenizer)
    assert made[0] == {
        "problem": PROBLEM.id,
        "family": "reversal",
        "form": "reasoned",
        "expert": "abc",
        "system": SYSTEM,
        "prompt": "Reverse 1234.",
        "thought": "</think> 4 3\n2 1",
        "answer": "\n\\boxed{4321} ",
        "expected": "4321",
    }
    write_samples(tmp_path / "s.parquet", made)
    assert pq.read_table(tmp_path / "s.parquet").to_pylist() == made
    assert read_samples(tmp_path / "s.parquet") == [
        Conversation("Reverse 1234.", "</think> 4 3\n2 1", "\n\\boxed{4321} ", SYSTEM),
        Conversation("Reverse 1234.", "", "\\boxed{4321}", ""),
    ]


def test_reverify(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    good = rows(tokenizer)
    spoiled = [
        {**good[0], "answer": "\\boxed{4321"},
        {**good[1], "expected": "1"},
        {**good[1], "thought": " "},
    ]
    write_samples(tmp_path / "s.parquet", good + spoiled)
    assert reverify(tmp_path / "s.parquet", tokenizer) == (5, 2)
