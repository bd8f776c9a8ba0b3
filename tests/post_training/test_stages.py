"""The stages of post-training end to end: what they publish, and that a second or a stopped try equals it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from torch import Tensor

from data.chat import ChatTokenizer
from data.loader import ShardLoader
from flows.open_model import open_model, require_fit
from infra.artifact import Artifact
from infra.errors import HeadwaterError
from infra.verify import verify
from model.checkpoint import load_model
from post_training import problem_sets
from post_training.reward import load_reward_model
from post_training.samples import reverify
from post_training.tasks.problem import SYSTEM, is_held_out
from tests.post_training.chain import NODES, ROW, Chain
from tests.post_training.small import small_model

CHECKPOINTS = ("pretrain", "extend", "expert", "sft", "reward", "grpo")


def lines(artifact: Artifact, log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in artifact.file(f"logs/{log}.jsonl").read_text().splitlines()]


def test_tasks(chain: Chain) -> None:
    train = problem_sets.read(chain["tasks"].file("train.parquet"))
    held = problem_sets.read(chain["tasks"].file("heldout.parquet"))
    assert {f: sum(p.family == f for p in train) for f in ("reversal", "passkey")} == {
        "reversal": 10,
        "passkey": 6,
    }
    assert {f: sum(p.family == f for p in held) for f in ("reversal", "passkey")} == {
        "reversal": 12,
        "passkey": 2,
    }
    assert not any(is_held_out(p, 0.3) for p in train)
    assert all(is_held_out(p, 0.3) for p in held)
    # Held-out problems keep their thought and go without a system prompt whatever the shares are.
    stored = pq.read_table(chain["tasks"].file("heldout.parquet")).to_pylist()
    assert all(bool(row["thought"]) == (row["family"] == "reversal") for row in stored)
    assert {row["system"] for row in stored} == {""}
    assert chain["tasks"].metrics == {"train": 16, "held_out": 14}


def test_pretrain(chain: Chain) -> None:
    artifact = chain["pretrain"]
    model = load_model(artifact.path)
    assert model.config.to_dict() == NODES["pretrain"][2]["model"]
    assert artifact.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert (
        artifact.file("tokenizer.json").read_bytes() == chain["tokenizer"].file("tokenizer.json").read_bytes()
    )
    held = chain["pack"].json("stats.json")["heldout"]
    nats = artifact.metrics["held_out_loss"] * held["targets"]
    assert artifact.metrics["held_out_bits_per_byte"] == pytest.approx(nats / math.log(2) / held["bytes"])
    assert artifact.metrics["bigram_bits_per_byte"] == chain["pack"].metrics["bigram_bits_per_byte"]
    log = lines(artifact, "metrics")
    assert [line["step"] for line in log] == list(range(1, 14))
    assert log[-1]["tokens"] == 13 * 8 * ROW
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    # Measured on the way at every seventh step and at the end, where all rows say what the record says.
    assert [line["step"] for line in log if "watched_loss" in line] == [7, 13]


def test_extend(chain: Chain) -> None:
    artifact = chain["extend"]
    config = load_model(artifact.path).config
    assert config.rope_factor == 3
    assert artifact.metrics["context"] == config.max_position_embeddings == 3 * ROW
    grid = artifact.json("passkey.json")
    # Two phases: before either, before the last, and after; lengths and depths in order.
    assert sorted(grid) == ["after", "before", "before_last_phase"]
    for name, rows in grid.items():
        assert sorted(rows, key=int) == [str(ROW - 24), str(2 * ROW - 24)]
        assert all(list(row) == ["0.0", "1.0"] for row in rows.values())
        longest = rows[str(2 * ROW - 24)]
        assert artifact.metrics[f"passkey_{name}"] == pytest.approx(sum(longest.values()) / 2)
        assert artifact.file(f"plots/passkey_{name}.png").stat().st_size > 1000
    for phase, steps in ((1, 12), (2, 11)):
        assert [line["step"] for line in lines(artifact, f"phase{phase}")] == list(range(1, steps + 1))


def test_a_later_phase_sees_other_rows(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    stream = ShardLoader.stream

    def recorded(self: ShardLoader, start: int, count: int) -> dict[str, Tensor]:
        read.append((start, count))
        return stream(self, start, count)

    monkeypatch.setattr(ShardLoader, "stream", recorded)
    chain.build("extend", {"phases": [{"factor": 2, "steps": 3}, {"factor": 3, "steps": 2}]})
    assert read == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2)]


def test_expert(chain: Chain) -> None:
    artifact = chain["expert"]
    assert artifact.json("expert.json") == {"families": ["reversal"]}
    assert artifact.metrics["rl_steps"] == 3
    assert artifact.metrics["left_out"] == 0
    rl = lines(artifact, "rl")
    assert artifact.metrics["sequence_tokens"] == rl[-1]["tokens"]
    # The expert is asked with the system prompt, and has learnt its few problems by heart.
    assert rl[0]["correct"] > 0.4
    assert rl[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_distill(chain: Chain) -> None:
    artifact = chain["distill"]
    path = artifact.file("samples.parquet")
    rows = pq.read_table(path).to_pylist()
    tokenizer = ChatTokenizer(chain["expert"].file("tokenizer.json"))
    assert reverify(path, tokenizer) == (len(rows), len(rows))
    assert artifact.metrics["samples"] == len(rows) > 10
    assert artifact.metrics["reverified"] == 1.0
    known = {p.id: p for p in problem_sets.read(chain["prompts"].file("train.parquet"))}
    for row in rows:
        problem = known[row["problem"]]
        assert (row["prompt"], row["expected"], row["family"]) == (problem.prompt, problem.answer, "reversal")
        assert row["system"] == (SYSTEM if row["form"] == "reasoned" else "")
        assert row["form"] == "concise" or row["thought"]
        assert row["expert"] == chain["expert"].digest[:12]
    for form in ("concise", "reasoned"):
        served = {row["problem"] for row in rows if row["form"] == form}
        assert artifact.metrics[f"kept_reversal_{form}"] == len(served) / 10
        assert len([row for row in rows if row["form"] == form]) == len(served)
    both = artifact.metrics["kept_reversal_concise"] + artifact.metrics["kept_reversal_reasoned"]
    assert artifact.metrics["kept"] == pytest.approx(both / 2)
    assert artifact.json("stats.json") == {"samples": len(rows), "asked": 20, "reverified": len(rows)}


def test_sft(chain: Chain) -> None:
    artifact = chain["sft"]
    log = lines(artifact, "metrics")
    assert artifact.metrics["samples"] == chain["distill"].metrics["samples"] + 6
    assert artifact.metrics["left_out"] == 0
    assert artifact.metrics["steps"] == len(log)
    assert artifact.metrics["tokens"] == len(log) * 4 * ROW == log[-1]["tokens"]
    assert artifact.metrics["token_passes"] == 3 * artifact.metrics["tokens"]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    # It descends from the extended base.
    assert load_model(artifact.path).config.rope_factor == 3


def test_reward(chain: Chain) -> None:
    artifact = chain["reward"]
    model = load_reward_model(artifact.path)
    assert artifact.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert artifact.metrics["pairs"] > 0
    assert artifact.metrics["held_out_pairs"] > 0
    assert 0 <= artifact.metrics["held_out_accuracy"] <= 1
    assert [line["step"] for line in lines(artifact, "metrics")] == list(range(1, 12))


def test_grpo(chain: Chain) -> None:
    artifact = chain["grpo"]
    log = lines(artifact, "rl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert artifact.metrics["rl_steps"] == 6
    assert artifact.metrics["sequence_tokens"] == log[-1]["tokens"]
    # Rollout, reference and old policy, two updates of three each, and the reward model.
    assert artifact.metrics["token_passes"] == 10 * log[-1]["tokens"]
    # The reward holds the rules and a tenth of the reward model's score in (0, 1).
    for line in log:
        rules = line["correct"] + 0.1 * line["well_formed"]
        assert rules < line["reward"] < rules + 0.1


def test_evaluate(chain: Chain) -> None:
    artifact = chain["evaluate"]
    table = artifact.json("scores.json")
    assert sorted(table) == ["plain", "system"]
    for name, suffix in (("plain", ""), ("system", "_system")):
        overall, reversal = table[name]
        assert (overall["family"], reversal["family"]) == ("", "reversal")
        assert overall["responses"] == 24 == artifact.metrics["responses"]
        assert artifact.metrics[f"pass_at_1{suffix}"] == overall["passed"]
        assert artifact.metrics[f"format{suffix}"] == overall["well_formed"]
    shown = artifact.json("samples.json")
    assert [sample["system"] for sample in shown] == ["", SYSTEM] * 2
    held = {p.prompt: p for p in problem_sets.read(chain["prompts"].file("heldout.parquet"))}
    for sample in shown:
        assert held[sample["prompt"]].answer == sample["expected"]
    held_out = chain["pack"].json("stats.json")["heldout"]
    nats = artifact.metrics["text_loss"] * held_out["targets"]
    assert artifact.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / held_out["bytes"])


def test_evaluate_asks_held_out_problems_only(chain: Chain) -> None:
    trained = {
        p.id for node in ("tasks", "prompts") for p in problem_sets.read(chain[node].file("train.parquet"))
    }
    held = {p.id for p in problem_sets.read(chain["prompts"].file("heldout.parquet"))}
    assert not trained & held


def test_evaluate_tells_checkpoints_apart(chain: Chain) -> None:
    scores = {
        node: chain.build("evaluate", {"families": ["reversal"]}, {"checkpoint": [node]}).artifact.metrics
        for node in ("pretrain", "expert")
    }
    assert scores["pretrain"]["format_system"] < 0.3
    assert scores["expert"]["format_system"] > 0.5


def test_export(chain: Chain) -> None:
    artifact = chain["export"]
    card = artifact.file("README.md").read_text()
    assert chain["grpo"].digest in card
    assert f"| pass_at_1 | {round(chain['evaluate'].metrics['pass_at_1'], 4)} |" in card
    assert artifact.metrics["pass_at_1"] == chain["evaluate"].metrics["pass_at_1"]
    config = artifact.json("config.json")
    assert config["model_type"] == "deepseek_v3"
    # What the statement attests are the files it lies beside, and it reaches back to the raw text.
    statement = artifact.json("logs/provenance.json")
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert subjects == {name: hashlib.sha256(data).hexdigest() for name, data in payload(artifact).items()}
    assert artifact.metrics["files"] == len(subjects)
    built = statement["predicate"]["buildDefinition"]
    assert built["externalParameters"]["stage"] == "export"
    behind = {one["digest"].get("sha256") for one in built["resolvedDependencies"]}
    assert {chain[node].digest for node in ("grpo", "sft", "distill", "pretrain", "ingest")} <= behind


def test_a_model_and_another_vocabulary_are_not_opened(tokenizer: ChatTokenizer) -> None:
    require_fit("sft@1", small_model(vocab_size=tokenizer.vocab_size), tokenizer)
    with pytest.raises(
        HeadwaterError, match=r"sft@1: tokenizer.json has \d+ tokens and the model's embedding"
    ):
        require_fit("sft@1", small_model(vocab_size=tokenizer.vocab_size - 1), tokenizer)


def test_export_in_fp8_blocks_opens_as_any_other(chain: Chain) -> None:
    artifact = chain.build("export", {"weights": "fp8"}).artifact
    assert artifact.json("config.json")["quantization_config"]["quant_method"] == "fp8"
    assert artifact.file("model.safetensors").stat().st_size < (
        0.5 * chain["export"].file("model.safetensors").stat().st_size
    )
    model, _ = open_model(artifact)
    exact, _ = open_model(chain["export"])
    for name, weight in model.state_dict().items():
        assert (weight - exact.state_dict()[name]).norm() <= 0.05 * exact.state_dict()[name].norm(), name


@pytest.mark.parametrize("node", CHECKPOINTS)
def test_checkpoints_carry_their_tokenizer(chain: Chain, node: str) -> None:
    found = chain[node].file("tokenizer.json").read_bytes()
    assert found == chain["tokenizer"].file("tokenizer.json").read_bytes()


def payload(artifact: Artifact) -> dict[str, bytes]:
    return {entry.path: (artifact.path / entry.path).read_bytes() for entry in artifact.record.files}


def same(one: Artifact, other: Artifact) -> None:
    """Assert that two attempts agree in every byte of the payload and every recorded metric."""
    assert one.id != other.id
    assert {p: len(b) for p, b in payload(one).items()} == {p: len(b) for p, b in payload(other).items()}
    assert payload(one) == payload(other)
    assert one.digest == other.digest
    assert one.metrics == other.metrics


@pytest.mark.parametrize("node", ["tasks", "distill", "evaluate", "export"])
def test_a_forced_second_attempt_is_the_same(chain: Chain, node: str) -> None:
    same(chain[node], chain.again(node))


@pytest.mark.parametrize("node", [n for n in NODES if n not in ("tokenizer", "pack", "pack_long")])
def test_no_reference_path_or_time_in_the_payload(chain: Chain, node: str) -> None:
    artifact = chain[node]
    refs = [ref.id for ref in artifact.record.inputs] + [artifact.id]
    foreign = [str(chain.store.home), str(Path.cwd()), artifact.record.started[:13], *refs]
    for path, content in payload(artifact).items():
        for text in foreign:
            assert text.encode() not in content, (path, text)


def nth(count: int, done: int, total: int) -> Callable[[dict[str, Any]], bool]:
    """The event that says `done` of `total` for the `count`-th time, once."""
    seen = [0]

    def stop(event: dict[str, Any]) -> bool:
        hit = event["event"] == "progress" and (event["done"], event["total"]) == (done, total)
        seen[0] += hit
        return hit and seen[0] == count

    return stop


STOPS = {
    "pretrain": ("pretrain", 10 * 8 * ROW, 13 * 8 * ROW),
    "extend in its first phase": ("extend", 10, 12),
    "extend between its phases": ("extend", 12, 12),
    "extend in its second phase": ("extend", 10, 11),
    "expert in SFT": ("expert", 20, 0),
    "expert in RL": ("expert", 3, 3),
    "sft": ("sft", 10, 0),
    "reward": ("reward", 10, 11),
    "grpo": ("grpo", 5, 6),
}


@pytest.mark.parametrize("where", STOPS)
def test_stopped_and_resumed_is_the_same(chain: Chain, where: str) -> None:
    node, done, total = STOPS[where]
    if not total:
        log = lines(chain[node], "sft" if node == "expert" else "metrics")
        total = len(log)
    before = chain[node]
    resumed = chain.again(node, nth(1, done, total))
    same(before, resumed)
    # The log is whole too: every step once.
    for path in before.names("logs/*.jsonl"):
        steps = [[line["step"] for line in lines(one, Path(path).stem)] for one in (before, resumed)]
        assert steps[0] == steps[1]


def test_the_store_is_sound(chain: Chain) -> None:
    """Everything that was built verifies back to the source texts."""
    assert verify(chain.store, chain["export"]).ok
