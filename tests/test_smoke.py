"""The smoke preset end to end, through the command that a user types: every stage, real input, one store.

The tests share one run and ask different things of it, in the order a user would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.store import Store

STAGES = {
    "ingest",
    "filter",
    "dedup",
    "decontaminate",
    "tokenizer",
    "tasks",
    "pack",
    "pretrain",
    "extend",
    "expert",
    "distill",
    "sft",
    "reward",
    "grpo",
    "evaluate",
    "export",
}


class Home:
    """A store made by one run of the preset, and the command to ask it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder)
        self.seconds = 0.0

    def headwater(self, *args: str, code: int = 0) -> str:
        """Standard output of a command that must end with `code`."""
        env = {**os.environ, "HEADWATER_HOME": str(self.folder)}
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *args], env=env, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("smoke"))
    began = time.monotonic()
    home.headwater("run", "--preset", "smoke", "--no-prefect")
    home.seconds = time.monotonic() - began
    return home


def test_every_stage_is_built_and_the_export_is_promoted(home: Home) -> None:
    assert {artifact.stage for artifact in home.store.artifacts()} == STAGES
    assert home.store.resolve("chat").stage == "export"
    assert home.seconds < 240, "90 s on two idle cores; more than twice that is a fault, not a busy machine"


def test_it_learned(home: Home) -> None:
    """Three-digit problems are within reach of this model; an untrained one gets none right."""
    metrics = home.store.resolve("smoke/eval_grpo").metrics
    assert metrics["format"] >= 0.8
    assert metrics["pass_at_1"] >= 0.05
    assert home.store.resolve("smoke/distill").metrics["reverified"] == 1.0


def test_a_second_run_builds_nothing_and_is_quick(home: Home) -> None:
    before = {a.ref for a in home.store.artifacts()}
    began = time.monotonic()
    home.headwater("run", "--preset", "smoke")
    assert time.monotonic() - began < 10
    assert {a.ref for a in home.store.artifacts()} == before


def test_lineage_reaches_the_source_documents_through_every_stage(home: Home) -> None:
    graph = json.loads(home.headwater("lineage", "chat", "--json"))
    assert {node["stage"] for node in graph["nodes"]} == STAGES
    reached, edges = {graph["root"]}, graph["edges"]
    while True:
        more = {
            end
            for edge in edges
            for end in (edge["from"], edge["to"])
            if reached & {edge["from"], edge["to"]}
        }
        if more <= reached:
            break
        reached |= more
    assert {node["ref"] for node in graph["nodes"]} == reached


def test_verify_rehashes_everything_and_finds_a_flipped_byte(home: Home) -> None:
    assert "all as published" in home.headwater("verify", "chat")
    victim = home.store.resolve("smoke/dedup").files("documents/*.parquet")[0]
    original = victim.read_bytes()
    changed = bytearray(original)
    changed[len(changed) // 2] ^= 1
    mode = victim.stat().st_mode
    victim.chmod(0o644)
    try:
        victim.write_bytes(bytes(changed))
        env = {**os.environ, "HEADWATER_HOME": str(home.folder)}
        found = subprocess.run(
            [sys.executable, "-m", "flows.cli", "verify", "chat"], env=env, capture_output=True, text=True
        )
        assert found.returncode != 0
        assert victim.name in found.stdout + found.stderr
    finally:
        victim.write_bytes(original)
        victim.chmod(mode)


def test_one_stage_again_with_one_field_changed(home: Home) -> None:
    before = {a.ref for a in home.store.artifacts()}
    first = home.store.resolve("smoke/sft").ref
    home.headwater("stage", "sft", "--run", "smoke", "--set", "sft.epochs=3")
    [made] = {a.ref for a in home.store.artifacts()} - before
    assert made.startswith("sft@")
    differences = json.loads(home.headwater("diff", first, made, "--json"))
    assert [d["field"] for d in differences if d["kind"] == "identity"] == ["config.epochs"]


def test_the_export_answers_in_transformers_as_the_engine_does(home: Home) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.chat import EOS
    from flows.open_model import open_model
    from model.engine.engine import Engine, Request
    from model.engine.sampling import Sampling

    export = home.store.resolve("chat")
    model, tokenizer = open_model(export)
    theirs = AutoModelForCausalLM.from_pretrained(export.path, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(export.path)
    prompts = ["Sort 321.", "Reverse 704.", "Sort 58.", "What is the pass key?"]
    requests = [Request(tuple(tokenizer.prompt_ids(prompt))) for prompt in prompts]
    ours = Engine(model, [EOS]).generate(requests, Sampling(max_tokens=24, temperature=0.0))
    for prompt, request, completion in zip(prompts, requests, ours, strict=True):
        message = [{"role": "user", "content": prompt}]
        ids = their_tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert tuple(ids) == request.prompt
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = theirs(tokens).logits
            assert torch.allclose(logits, model.logits(model(tokens).states_BTD[0]), atol=1e-4)
            answer = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=EOS,
            )
        assert answer[0, len(ids) :].tolist() == completion.tokens


def test_bad_names_say_what_there_is(home: Home) -> None:
    for args in (
        ("run", "--preset", "smok"),
        ("run", "--preset", "smoke", "--set", "sft.epoch=3"),
        ("stage", "sfft", "--run", "smoke"),
        ("show", "smoke/sfft"),
    ):
        env = {**os.environ, "HEADWATER_HOME": str(home.folder)}
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *args], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert any(word in done.stderr for word in ("smoke", "epochs", "sft")), done.stderr
