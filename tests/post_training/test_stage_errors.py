"""Stages that cannot go on say what is wrong and what to do, and publish nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from infra.build import build
from infra.config import parse
from infra.errors import ConfigError, HeadwaterError
from post_training.tasks.registry import FAMILIES
from tests.post_training.chain import NODES, ROW, STAGES, Chain


def refuses(
    chain: Chain, node: str, message: str, inputs: dict[str, Any] | None = None, **changes: Any
) -> None:
    """Assert that building a node with these changes fails with this message and leaves no artifact."""
    before = sorted(chain.store.home.glob("artifacts/*/*"))
    with pytest.raises(HeadwaterError, match=message):
        chain.build(node, changes, inputs)
    assert sorted(chain.store.home.glob("artifacts/*/*")) == before


@pytest.fixture
def chain_ready(chain: Chain) -> Chain:
    """The chain with all of it built, so that what a test sees failing is its own node; and one expert more,
    that never learnt anything."""
    assert chain["export"]
    if "untrained" not in chain.built:
        chain.built["untrained"] = chain.build("expert", {"epochs": 0.01, "rl_steps": 0}).artifact
    return chain


def test_tasks(chain_ready: Chain) -> None:
    family = {"train": 0, "held_out": 0, "size": 4}
    for families in ({}, {"sorting": family}):
        refuses(chain_ready, "tasks", r"tasks\.families asks for no problem at all", families=families)
    refuses(
        chain_ready, "tasks", "size 40 is outside 2 to 24", families={"sorting": {"train": 1, "size": 40}}
    )
    known = "|".join(map(re.escape, sorted(FAMILIES)))
    refuses(chain_ready, "tasks", rf"'sortin'; .*({known})", families={"sortin": {"train": 1}})
    refuses(chain_ready, "tasks", "too few different ones", families={"sorting": {"train": 200, "size": 2}})


def test_pretrain_needs_the_vocabulary_of_its_shards(chain_ready: Chain) -> None:
    model = {**NODES["pretrain"][2]["model"], "vocab_size": 300}
    refuses(chain_ready, "pretrain", r"model\.vocab_size is 300, but pack@\w+ uses 320 tokens", model=model)


def test_pretrain_needs_the_tokenizer_of_its_shards(chain_ready: Chain) -> None:
    other = chain_ready.build("tokenizer", {"vocab_size": 310}).artifact
    stage = STAGES["pretrain"]
    config = parse(stage.config, NODES["pretrain"][2])
    with pytest.raises(
        HeadwaterError, match=r"packed with tokenizer@\w+, and the model has another tokenizer"
    ):
        build(chain_ready.store, stage, config, {"shards": [chain_ready["pack"]], "tokenizer": [other]})


def test_rows_longer_than_the_context(chain_ready: Chain) -> None:
    refuses(
        chain_ready,
        "pretrain",
        rf"rows of {2 * ROW} tokens do not fit model\.original_max_position_embeddings = {ROW}",
        inputs={"shards": ["pack_long"]},
    )
    refuses(
        chain_ready,
        "extend",
        rf"rows of {2 * ROW} tokens do not fit the context of {ROW + ROW // 2} of extend\.phases 1",
        phases=[{"factor": 1.5, "steps": 1}],
    )


def test_extend_measures_what_a_key_fits_into(chain_ready: Chain) -> None:
    refuses(chain_ready, "extend", "a pass-key problem takes at least", grid_lengths=[0.3])


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        ("pretrain", {"optimizer": "adam"}, r"optimizer: input should be 'adamw' or 'muon'"),
        ("pretrain", {"precision": "fp16"}, r"precision: input should be"),
        ("extend", {"phases": []}, r"phases: list should have at least 1 item"),
        ("extend", {"phases": [{"factor": 1.0}]}, r"phases\.0\.factor"),
        ("extend", {"grid_depths": [1.5]}, r"grid_depths\.0"),
        ("expert", {"families": []}, r"families: list should have at least 1 item"),
        ("grpo", {"group_size": 1}, r"group_size"),
        ("tasks", {"held_out_share": 0.0}, r"held_out_share"),
    ],
)
def test_configurations_are_checked_before_anything_runs(
    chain: Chain, node: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(STAGES[node].config, {**NODES[node][2], **changes})


def test_expert_of_a_family_without_problems(chain_ready: Chain) -> None:
    refuses(chain_ready, "expert", "no problem of family 'sorting'", families=["reversal", "sorting"])
    refuses(chain_ready, "expert", "fits a row of 8 tokens: raise sequence_length", sequence_length=8)


def test_distill_when_no_expert_is_ever_right(chain_ready: Chain) -> None:
    refuses(
        chain_ready,
        "distill",
        "no expert answered any problem correctly; train the experts longer, or ask easier problems",
        inputs={"experts": ["untrained"]},
    )


def test_sft_without_samples(chain_ready: Chain) -> None:
    nothing = {"samples": [], "problems": []}
    refuses(chain_ready, "sft", "no samples; give it a distill artifact", inputs=nothing, direct_families=[])
    refuses(
        chain_ready,
        "sft",
        r"sft\.direct_families names 'sorting'.*holds none; .*passkey",
        direct_families=["sorting"],
    )
    # Named, and the input forgotten: not a reason to train without them.
    refuses(
        chain_ready,
        "sft",
        r"direct_families names 'passkey'.*holds none; there are none yet",
        inputs={"problems": []},
    )


def test_reward_without_pairs(chain_ready: Chain) -> None:
    refuses(
        chain_ready,
        "reward",
        r"0 training and 0 held-out pairs .* from 0 right ones of 20\. Raise reward\.problems",
        inputs={"policy": ["untrained"]},
        samples=2,
        max_tokens=2,
    )


def test_grpo(chain_ready: Chain) -> None:
    refuses(chain_ready, "grpo", "no problem of family 'additions'", families=["additions"])
    direct = {"families": {"passkey": {"train": 3, "size": 20}}}
    chain_ready.built["direct"] = chain_ready.build("tasks", direct).artifact
    refuses(
        chain_ready,
        "grpo",
        "no problem with a worked solution; name the families",
        inputs={"problems": ["direct"]},
        families=[],
    )


def test_grpo_with_problems_that_do_not_fit_the_context(chain_ready: Chain) -> None:
    long = {"families": {"passkey": {"train": 3, "size": 4000}}, "seed": 1}
    chain_ready.built["long"] = chain_ready.build("tasks", long).artifact
    refuses(
        chain_ready,
        "grpo",
        rf"family passkey takes \d+ tokens, and the model's context is {3 * ROW}",
        inputs={"problems": ["long"]},
        families=["passkey"],
        groups=8,
    )


def test_grpo_with_a_reward_model_of_another_tokenizer(chain_ready: Chain) -> None:
    other = Chain(chain_ready.store, chain_ready.texts)
    other.built = {name: chain_ready[name] for name in ("ingest", "tasks", "prompts")}
    other.built["tokenizer"] = chain_ready.build("tokenizer", {"vocab_size": 310}).artifact
    short = {"epochs": 4, "rl_steps": 0, "max_tokens": 8}
    other.built["pretrain"] = other.build("pretrain", {"tokens": 1}).artifact
    other.built["expert"] = other.build("expert", short, {"base": ["pretrain"]}).artifact
    chain_ready.built["foreign"] = other["expert"]
    message = r"reward@\w+ reads another tokenizer than expert@\w+ writes"
    refuses(chain_ready, "grpo", message, inputs={"policy": ["foreign"]})


def test_evaluate_with_too_few_held_out_problems(chain_ready: Chain) -> None:
    refuses(
        chain_ready,
        "evaluate",
        r"problems is 13, which makes 13 of each of 1 families, but 12 held-out problems of reversal",
        problems=13,
    )
    refuses(chain_ready, "evaluate", "no problem of family 'sorting'", families=["sorting"])


def test_evaluate_with_fewer_problems_than_families(chain_ready: Chain) -> None:
    both = {"families": ["reversal", "passkey"], "problems": 1, "samples": 1, "max_tokens": 4}
    artifact = chain_ready.build("evaluate", both).artifact
    assert artifact.metrics["responses"] == 2
