"""Fine-tuning samples on disk: what an expert said, how it was asked, and what it had to say to be kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.chat import ChatTokenizer
from infra.files import write_parquet
from post_training.rollout import Rollout
from post_training.sft import Conversation
from post_training.verifiers import verify

SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "problem",
            "family",
            "form",
            "expert",
            "system",
            "prompt",
            "thought",
            "answer",
            "expected",
        )
    ]
)


def sample_row(tokenizer: ChatTokenizer, rollout: Rollout, form: str, expert: str) -> dict[str, str]:
    """A row of SCHEMA; `answer` is everything after the thought."""
    response = tokenizer.parse_response(rollout.response_ids)
    return {
        "problem": rollout.problem.id,
        "family": rollout.problem.family,
        "form": form,
        "expert": expert,
        "system": rollout.system,
        "prompt": rollout.problem.prompt,
        "thought": response.thought,
        "answer": response.answer,
        "expected": rollout.problem.answer,
    }


def write_samples(path: Path, rows: Sequence[dict[str, str]]) -> None:
    write_parquet(path, pa.Table.from_pylist(list(rows), schema=SCHEMA))


def read_samples(path: Path) -> list[Conversation]:
    table = pq.read_table(path, columns=["prompt", "thought", "answer", "system"])
    return [Conversation(r["prompt"], r["thought"], r["answer"], r["system"]) for r in table.to_pylist()]


def reverify(path: Path, tokenizer: ChatTokenizer) -> tuple[int, int]:
    """(samples, those that pass) when every sample is encoded again from its text and judged anew."""
    rows = pq.read_table(path).to_pylist()
    passed = sum(
        verify(tokenizer, tokenizer.response_ids(r["thought"], r["answer"]), r["expected"]).correct
        for r in rows
    )
    return len(rows), passed
