"""What is done once a run has ended: gates judged, a promotion made or refused, and the report written."""

from __future__ import annotations

import contextlib
from typing import Any

from flows.gates import Gate, Verdict, judge
from flows.report import Report, gather
from flows.report_page import write
from flows.runner import Result, figure
from infra.errors import CorruptArtifact, DiskFull
from infra.store import Store
from infra.verify import require_unchanged


def finish(store: Store, result: Result, yielding: bool = False) -> Report:
    """Judge the gates, promote if they allow it, note it all in the run, and write the page.

    yielding: leave a name alone that was promoted by something else than this run since.
    A full disk keeps the last two from being written and nothing else: the report says so.
    """
    preset = result.preset
    made = {name for name, one in result.outcomes.items() if one.ok}
    verdicts = [
        _verdict(judge(gate, lambda node, name: figure(result, node, name)))
        for gate in preset.gates
        if made.issuperset(
            node for _, node, _ in gate.terms
        )  # the others cannot be judged in a run of a part
    ]
    noted = {
        # The statuses of this very run: the documents of the nodes move on when one is built again.
        "statuses": {name: one.status for name, one in result.outcomes.items()},
        "seconds": round(result.seconds, 3),
        "gates": verdicts,
        "promotion": _promote(store, result, yielding),
    }
    with contextlib.suppress(DiskFull):
        store.names.describe_run(result.run, **noted)
    return write(gather(store, result.run, noted))


def _verdict(verdict: Verdict) -> dict[str, Any]:
    gate: Gate = verdict.gate
    return {
        "name": gate.name,
        "formula": gate.value,
        "value": verdict.value,
        "bound": gate.bound,
        "holds": verdict.holds,
        "problem": verdict.problem,
    }


def _promote(store: Store, result: Result, yielding: bool) -> str:
    """Point the preset's name at its artifact if the gates hold; says what was done."""
    promotion = result.preset.promote
    outcome = result.outcomes.get(promotion.node) if promotion else None
    if promotion is None or outcome is None or outcome.artifact is None or not result.ok:
        return ""
    for gate in promotion.gates:
        verdict = judge(gate, lambda node, name: figure(result, node, name))
        if not verdict.holds:
            said = verdict.problem or f"{gate.value} is {verdict.value:.4g}, {gate.bound} is asked"
            return f"not promoted to {promotion.name}: {said}"
    now = store.names.get(promotion.name)
    by = f"run {result.run}"
    if yielding and now is not None and now["by"] != by:
        return f"{promotion.name} stays {now['artifact']}, as {now['by'] or 'somebody'} set it"
    try:
        if now is None or now["artifact"] != outcome.artifact.ref:
            store.promote(outcome.artifact.ref, promotion.name, by=by)
        else:
            require_unchanged(store, outcome.artifact)
    except (DiskFull, CorruptArtifact) as error:
        return f"not promoted to {promotion.name}: {error}"
    return f"{promotion.name} is {outcome.artifact.ref}"
