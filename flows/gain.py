"""What reinforcement learning brought in a run, told in figures of the records.

The nodes are found through the graph, by stage and inputs and never by name: a checkpoint made by `grpo`, the
`sft` checkpoint that it started from, and a second `sft` that started from that one too (the control: the
same start, more fine-tuning instead). Only evaluations that asked all three the same are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from infra.artifact import Artifact
from infra.config import canonical_json

# Without these an evaluation cannot be told.
_NEEDED = ("pass_at_1", "pass_at_1_system", "reasoned")


def gains(artifacts: Iterable[Artifact]) -> tuple[str, ...]:
    """A paragraph for each `grpo` artifact whose start and control were evaluated as it was; often none."""
    known = {one.ref: one for one in artifacts}
    told = {}
    for scored in _evaluations(known.values()):
        for rl_ref, after in scored.items():
            rl = known.get(rl_ref)
            start = known.get(_input(rl, "policy")) if rl and rl.stage == "grpo" else None
            if rl is None or start is None or start.stage != "sft" or start.ref not in scored:
                continue
            for control in known.values():
                same_start = control.stage == "sft" and _input(control, "base") == start.ref
                if same_start and control.ref in scored and rl_ref not in told:
                    told[rl_ref] = _tell(scored[start.ref], after, scored[control.ref], rl, control)
    return tuple(told.values())


def _evaluations(artifacts: Iterable[Artifact]) -> list[dict[str, Mapping[str, Any]]]:
    """Checkpoint's reference -> metrics, one table for each way of asking (settings and problems)."""
    tables: dict[tuple[str, bytes], dict[str, Mapping[str, Any]]] = {}
    for one in artifacts:
        if one.stage == "evaluate" and all(name in one.metrics for name in _NEEDED):
            asked = (_input(one, "problems"), canonical_json(one.record.config["identity"]))
            tables.setdefault(asked, {})[_input(one, "checkpoint")] = one.metrics
    return list(tables.values())


def _input(artifact: Artifact, role: str) -> str:
    """The reference of what an artifact read in a role, "" when it read nothing there."""
    return next((pin.ref for pin in artifact.record.inputs if pin.role == role), "")


def _tell(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    instead: Mapping[str, Any],
    rl: Artifact,
    control: Artifact,
) -> str:
    spent, other = (one.metrics.get("forward_passes", 0.0) for one in (rl, control))
    compute = f", at {other / spent:.2f} times the extra compute (forward passes)," if spent and other else ""
    return (
        f"Without the system prompt the SFT model reasons in {_share(before['reasoned'])} of answers and is "
        f"right in {_share(before['pass_at_1'])} (with the prompt {_share(before['pass_at_1_system'])}); "
        f"after GRPO it reasons unasked in {_share(after['reasoned'])} and is right in "
        f"{_share(after['pass_at_1'])}; more SFT instead{compute} gives {_share(instead['pass_at_1'])}."
    )


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
