"""Rejection sampling: experts answer, verifiers judge, the concise and correct stay (report §5.1).

Every problem is asked in two forms: alone, and behind the system prompt that asks for reasoning. Of the
samples that pass, the shortest is kept, so that the final set is right and no longer than it needs to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from post_training.rollout import Rollout


@dataclass(frozen=True)
class Form:
    """How a problem is put to an expert."""

    name: str
    system: str
    must_reason: bool


def keep(rollouts: Sequence[Rollout], form: Form, samples: int, most: int) -> list[Rollout]:
    """From groups of `samples` consecutive rollouts, at most `most` each: correct, reasoned if the form
    asks for it, shortest first; different texts only."""
    kept: list[Rollout] = []
    for start in range(0, len(rollouts), samples):
        group = rollouts[start : start + samples]
        passing = {
            r.response_ids: r
            for r in group
            if r.verdict.correct and (r.verdict.reasoned or not form.must_reason)
        }
        ranked = sorted(passing.values(), key=lambda r: (len(r.response_ids), r.response_ids))
        kept += ranked[:most]
    return kept
