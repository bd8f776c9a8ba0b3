"""Rejection sampling: experts answer, verifiers judge, the concise and correct stay (report §5.1).

Every problem is asked in two forms: alone, where the answer must come at once, and behind the system prompt
that asks for reasoning, where it must be reasoned. Of the samples that pass, the shortest is kept, so that
the final set is right and no longer than it needs to be. A problem without such a sample is left out of that
form.
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
    reasons: bool
    """Whether a sample must hold a thought, or must not."""


def keep(rollouts: Sequence[Rollout], form: Form, samples: int, most: int) -> list[Rollout]:
    """From groups of `samples` consecutive rollouts, at most `most` each: correct and of the
    form, shortest first; different texts only."""
    kept: list[Rollout] = []
    for start in range(0, len(rollouts), samples):
        group = rollouts[start : start + samples]
        passing = {
            r.response_ids: r for r in group if r.verdict.correct and r.verdict.reasoned == form.reasons
        }
        ranked = sorted(passing.values(), key=lambda r: (len(r.response_ids), r.response_ids))
        kept += ranked[:most]
    return kept
