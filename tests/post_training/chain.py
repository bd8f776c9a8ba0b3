"""All stages one after another in a real store, on problems that a tiny model learns by heart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.stages import (
    distill,
    evaluate,
    expert,
    export,
    extend,
    grpo,
    ingest,
    pack,
    pretrain,
    reward,
    sft,
    tasks,
    tokenizer,
)
from infra.artifact import Artifact
from infra.build import BuildResult, build
from infra.config import parse
from infra.errors import BuildInterrupted
from infra.stage import Stage
from infra.store import Store, open_store
from tests.post_training.small import SMALL

ROW = SMALL.original_max_position_embeddings
STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (
        distill,
        evaluate,
        expert,
        export,
        extend,
        grpo,
        ingest,
        pack,
        pretrain,
        reward,
        sft,
        tasks,
        tokenizer,
    )
}

# node: (stage, inputs by role, config). Few problems, so that they are known by heart soon; every interval of
# checkpoints is odd to the interval of progress reports, so that a run stopped at a report lost some steps.
Node = tuple[str, dict[str, list[str]], dict[str, Any]]
NODES: dict[str, Node] = {
    "tasks": (
        "tasks",
        {},
        {
            "held_out_share": 0.3,
            "direct_share": 0.2,
            "system_share": 0.5,
            "families": {
                "reversal": {"train": 10, "held_out": 12, "size": 4},
                "passkey": {"train": 6, "held_out": 2, "size": 40},
            },
        },
    ),
    "prompts": (
        "tasks",
        {},
        {
            "held_out_share": 0.3,
            "families": {
                "reversal": {"train": 10, "held_out": 12, "size": 4},
                "passkey": {"train": 6, "held_out": 2, "size": 40},
            },
        },
    ),
    "tokenizer": (
        "tokenizer",
        {"documents": ["ingest"], "problems": ["tasks"]},
        {"vocab_size": SMALL.vocab_size, "sample_bytes": 6000, "problem_share": 0.8, "max_digits": 1},
    ),
    "pack": (
        "pack",
        {"documents": ["ingest"], "problems": ["tasks"], "tokenizer": ["tokenizer"]},
        {
            "sequence_length": ROW,
            "token_budget": 12000,
            "heldout_tokens": 600,
            "mixture": {"text": 0.1, "reversal": 0.7, "passkey": 0.2},
        },
    ),
    "pack_long": (
        "pack",
        {"documents": ["ingest"], "problems": ["tasks"], "tokenizer": ["tokenizer"]},
        {
            "sequence_length": 2 * ROW,
            "token_budget": 9000,
            "heldout_tokens": 400,
            "mixture": {"text": 0.2, "passkey": 0.8},
        },
    ),
    "pretrain": (
        "pretrain",
        {"shards": ["pack"], "tokenizer": ["tokenizer"]},
        {
            "model": SMALL.to_dict(),
            "tokens": 13 * 8 * ROW,
            "batch_rows": 8,
            "batch_ramp": False,
            "optimizer": "muon",
            "lr": 0.01,
            "muon_lr": 0.02,
            "bias_speed": 0.01,
            "checkpoint_every": 7,
            "watch_rows": 2,
        },
    ),
    "extend": (
        "extend",
        {"base": ["pretrain"], "shards": ["pack_long"]},
        {
            "phases": [{"factor": 2, "steps": 12}, {"factor": 3, "steps": 11}],
            "batch_rows": 2,
            "lr": 1e-3,
            "grid_lengths": [2.0, 1.0],
            "grid_depths": [1.0, 0.0],
            "grid_repeats": 2,
            "checkpoint_every": 7,
        },
    ),
    "expert": (
        "expert",
        {"base": ["extend"], "problems": ["prompts"]},
        {
            "families": ["reversal"],
            "problems": 10,
            "direct_share": 0.3,
            "epochs": 48,
            "batch_rows": 4,
            "sequence_length": ROW,
            "optimizer": "muon",
            "sft_lr": 0.005,
            "muon_lr": 0.01,
            "rl_steps": 3,
            "rl_lr": 1e-4,
            "groups": 2,
            "group_size": 4,
            "max_tokens": 40,
            "checkpoint_every": 7,
        },
    ),
    "distill": (
        "distill",
        {"experts": ["expert"], "problems": ["prompts"]},
        {"problems": 10, "samples": 2, "max_tokens": 40},
    ),
    "sft": (
        "sft",
        {"base": ["extend"], "samples": ["distill"], "problems": ["prompts"]},
        {
            "epochs": 24,
            "batch_rows": 4,
            "sequence_length": ROW,
            "warmup": 2,
            "lr": 0.005,
            "optimizer": "muon",
            "muon_lr": 0.01,
            "direct_families": ["passkey"],
            "checkpoint_every": 7,
        },
    ),
    "reward": (
        "reward",
        {"policy": ["sft"], "problems": ["prompts"]},
        {
            "problems": 10,
            "samples": 8,
            "temperature": 1.0,
            "max_tokens": 40,
            "held_out_share": 0.4,
            "steps": 11,
            "batch_pairs": 4,
            "checkpoint_every": 4,
        },
    ),
    "grpo": (
        "grpo",
        {"policy": ["sft"], "problems": ["prompts"], "reward": ["reward"]},
        {
            "families": ["reversal"],
            "steps": 6,
            "groups": 2,
            "group_size": 4,
            "max_tokens": 40,
            "lr": 1e-4,
            "updates": 2,
            "checkpoint_every": 2,
        },
    ),
    "evaluate": (
        "evaluate",
        {"checkpoint": ["grpo"], "problems": ["prompts"], "shards": ["pack"]},
        {"problems": 12, "samples": 2, "max_tokens": 40, "shown": 4},
    ),
    "export": ("export", {"checkpoint": ["grpo"], "evaluations": ["evaluate"]}, {"name": "tiny"}),
}


@dataclass
class Chain:
    """A store in which nodes are built when they are asked for."""

    store: Store
    texts: Path
    built: dict[str, Artifact] = field(default_factory=dict)

    def __getitem__(self, node: str) -> Artifact:
        if node not in self.built:
            self.built[node] = self.build(node).artifact
        return self.built[node]

    def build(
        self,
        node: str,
        changes: dict[str, Any] | None = None,
        inputs: dict[str, Sequence[str]] | None = None,
        **how: Any,
    ) -> BuildResult:
        """Build a node, with some fields of its configuration or some of its inputs replaced."""
        if node == "ingest":
            stage, roles, values = "ingest", {}, {"sources": str(self.texts)}
        else:
            stage, roles, values = NODES[node]
        config = parse(STAGES[stage].config, {**values, **(changes or {})})
        given = {role: [self[name] for name in names] for role, names in {**roles, **(inputs or {})}.items()}
        return build(self.store, STAGES[stage], config, given, **how)

    def again(self, node: str, stop: Callable[[dict[str, Any]], bool] | None = None) -> Artifact:
        """A second attempt at a node; with `stop`, interrupted once at the event it names and resumed."""
        if stop is not None:
            seen: list[dict[str, Any]] = []

            def events(event: dict[str, Any]) -> None:
                if stop(event):
                    seen.append(event)
                    raise KeyboardInterrupt

            with pytest.raises(BuildInterrupted, match="Run the same command again to resume"):
                self.build(node, force=True, events=events)
            assert len(seen) == 1
        result = self.build(node, force=True)
        assert result.status == ("built" if stop is None else "resumed")
        assert result.artifact.record.attempt > self[node].record.attempt
        return result.artifact


def make_chain(folder: Path) -> Chain:
    """An empty store, and a few real texts to ingest."""
    texts = folder / "texts"
    texts.mkdir()
    # The same on every interpreter: what small models learn from it must not depend on the version.
    licence = (Path(__file__).parents[2] / "LICENSE").read_text()
    for part in range(4):
        (texts / f"part{part}.txt").write_text(licence[part * 2000 : part * 2000 + 2000])
    return Chain(open_store(folder / "home"), texts)
