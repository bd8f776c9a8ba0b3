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
_FAMILY = "pass_at_1_"


def gains(artifacts: Iterable[Artifact]) -> tuple[str, ...]:
    """A paragraph for each `grpo` artifact whose start and control were evaluated as it was; often none."""
    # By digest: an evaluation of the first attempt is one of a second attempt with the same weights.
    known = {one.digest: one for one in artifacts}
    told = {}
    for scored in _evaluations(known.values()):
        for made, after in scored.items():
            rl = known.get(made)
            start = known.get(_input(rl, "policy")) if rl and rl.stage == "grpo" else None
            if rl is None or start is None or start.stage != "sft" or start.digest not in scored:
                continue
            judge = known.get(_input(rl, "reward"))
            spent = sum(one.metrics.get("token_passes", 0.0) for one in (rl, judge) if one)
            for control in known.values():
                same_start = control.stage == "sft" and _input(control, "base") == start.digest
                if same_start and control.digest in scored and made not in told:
                    other = control.metrics.get("token_passes", 0.0)
                    told[made] = _tell(
                        scored[start.digest], after, scored[control.digest], other / spent if spent else 0.0
                    )
    return tuple(told.values())


def _evaluations(artifacts: Iterable[Artifact]) -> list[dict[str, Mapping[str, Any]]]:
    """Checkpoint's digest -> metrics, one table for each way of asking (settings and problems)."""
    tables: dict[tuple[str, bytes], dict[str, Mapping[str, Any]]] = {}
    for one in artifacts:
        if one.stage == "evaluate" and all(name in one.metrics for name in _NEEDED):
            asked = (_input(one, "problems"), canonical_json(one.record.config["identity"]))
            tables.setdefault(asked, {})[_input(one, "checkpoint")] = one.metrics
    return list(tables.values())


def _input(artifact: Artifact, role: str) -> str:
    """The digest of what an artifact read in a role, "" when it read nothing there."""
    return next((pin.digest for pin in artifact.record.inputs if pin.role == role), "")


def _tell(
    before: Mapping[str, Any], after: Mapping[str, Any], instead: Mapping[str, Any], ratio: float
) -> str:
    """`ratio` is the control's extra compute over that of GRPO and its reward model, 0 when not known."""
    compute = f", at {ratio:.2f} times the extra compute (passes over a token)," if ratio else ""
    families = sorted(name for name in before if name.startswith(_FAMILY) and not name.endswith("_system"))
    by_family = ", ".join(
        f"{name.removeprefix(_FAMILY)} {_share(before[name])} to {_share(after[name])}"
        for name in families
        if name in after
    )
    return (
        f"Without the system prompt the SFT model reasons in {_share(before['reasoned'])} of answers and is "
        f"right in {_share(before['pass_at_1'])} (with the prompt {_share(before['pass_at_1_system'])}); "
        f"after GRPO it reasons unasked in {_share(after['reasoned'])} and is right in "
        f"{_share(after['pass_at_1'])}; more SFT instead{compute} gives {_share(instead['pass_at_1'])}."
        + (f" By family, before and after GRPO: {by_family}." if by_family else "")
    )


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
