"""The reinforcement-learning loop: resumed with the same bits, every step logged once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.chat import ChatTokenizer
from infra.checkpoint import Checkpoints
from infra.errors import HeadwaterError
from model.optim.build import Optimizer, OptimizerConfig
from model.train import Position, TrainingDiverged
from model.transformer import Transformer
from post_training.grpo import GRPOConfig
from post_training.reinforce import Reward, RLConfig, optimize
from post_training.rollout import Rollout
from post_training.tasks.problem import SYSTEM, Problem
from tests.post_training.small import Stopped, ignore, reversal, same_weights, small_model, stop_at

PROBLEMS = [reversal(str(1000 + i)) for i in range(20)]
SORTING = [Problem("sorting", f"Sort {i}.", "", str(i)) for i in range(2)]
GRPO = GRPOConfig(groups=3, group_size=4, updates=2)
CONFIG = RLConfig(steps=5, max_tokens=8, system_share=0.5, checkpoint_every=2)
TIMES = ("rollout_seconds", "update_seconds", "tokens_per_second")


def even_tokens(rollouts: Sequence[Rollout]) -> Tensor:
    """A reward with something to learn: the share of even ids."""
    return torch.tensor([sum(t % 2 == 0 for t in r.response_ids) / len(r.response_ids) for r in rollouts])


class Run:
    """One run in a folder, that can be stopped and started again with new objects."""

    def __init__(self, tokenizer: ChatTokenizer, folder: Path, reward: Reward = even_tokens) -> None:
        self.tokenizer, self.folder, self.reward = tokenizer, folder, reward
        self.asked: list[list[Rollout]] = []

    def go(
        self, stop: int = 0, problems: Sequence[Problem] = PROBLEMS + SORTING, config: RLConfig = CONFIG
    ) -> tuple[Transformer, Position]:
        model = small_model(0)

        def reward(rollouts: Sequence[Rollout]) -> Tensor:
            self.asked.append(list(rollouts))
            return self.reward(rollouts)

        position = optimize(
            model,
            small_model(0),
            Optimizer(model, OptimizerConfig(lr=2e-3, weight_decay=0.0)),
            self.tokenizer,
            problems,
            reward,
            GRPO,
            config,
            7,
            SYSTEM,
            Checkpoints(self.folder / "checkpoints"),
            self.folder / "rl.jsonl",
            stop_at(stop) if stop else ignore,
        )
        return model, position

    def lines(self) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (self.folder / "rl.jsonl").read_text().splitlines()]
        assert all(name in line for line in lines for name in TIMES)
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def test_resume_is_bit_exact(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    whole = Run(tokenizer, tmp_path / "whole")
    model, position = whole.go()
    assert not same_weights(model, small_model(0))
    for stop in (1, 2, 3):
        run = Run(tokenizer, tmp_path / f"stop{stop}")
        with pytest.raises(Stopped):
            run.go(stop)
        resumed, end = run.go()
        assert same_weights(model, resumed)
        assert end == position
        assert run.lines() == whole.lines()
        # From the last checkpoint on, the same was asked and answered.
        assert run.asked[stop:] == whole.asked[stop - stop % 2 :]
    assert [line["step"] for line in whole.lines()] == [1, 2, 3, 4, 5]


def test_a_finished_run_only_loads_its_end(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    run = Run(tokenizer, tmp_path)
    model, position = run.go()
    again, end = run.go()
    assert same_weights(model, again)
    assert end == position
    assert len(run.asked) == CONFIG.steps


def test_a_kill_between_log_and_checkpoint_loses_no_line(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    whole = Run(tokenizer, tmp_path / "whole")
    whole.go()
    run = Run(tokenizer, tmp_path / "killed")

    class Killed(Checkpoints):
        def save(self, *args: object) -> None:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.post_training.test_reinforce.Checkpoints", Killed)
        with pytest.raises(Stopped):
            run.go()
    assert len(run.lines()) == 2
    run.go()
    assert run.lines() == whole.lines()


def test_position_and_figures_count_what_was_sampled(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    run = Run(tokenizer, tmp_path)
    _, position = run.go()
    sampled = [r for rollouts in run.asked for r in rollouts]
    assert position == Position(
        step=5,
        rows=5 * 3 * 4,
        tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in sampled),
    )
    for line, rollouts in zip(run.lines(), run.asked, strict=True):
        assert line["response_tokens"] == pytest.approx(sum(len(r.response_ids) for r in rollouts) / 12)
        assert line["reward"] == pytest.approx(float(even_tokens(rollouts).mean()))
    # Half with the system prompt, both families whatever the size of their pools.
    assert {r.system for r in sampled} == {"", SYSTEM}
    small_pool = sum(r.problem.family == "sorting" for r in sampled) / len(sampled)
    assert 0.2 < small_pool < 0.8


def test_every_step_draws_anew(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """Asked the same question at each step by a policy that stands still, nothing is said twice."""
    run = Run(tokenizer, tmp_path, lambda rollouts: torch.zeros(len(rollouts)))
    run.go(problems=PROBLEMS[:1], config=RLConfig(steps=3, max_tokens=8))
    said = [r.response_ids for rollouts in run.asked for r in rollouts]
    assert len(said) == 3 * 12
    assert len(set(said)) > 30


def test_without_problems(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(HeadwaterError, match="at least one problem with a known answer"):
        Run(tokenizer, tmp_path).go(problems=[])


def test_a_reward_that_is_no_number_ends_the_run(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    calls = []

    def broken(rollouts: Sequence[Rollout]) -> Tensor:
        calls.append(1)
        return even_tokens(rollouts) if len(calls) < 4 else torch.full((len(rollouts),), float("nan"))

    run = Run(tokenizer, tmp_path, broken)
    with pytest.raises(TrainingDiverged, match=r"step 4: reward is nan.*last checkpoint is from before"):
        run.go()
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]
    assert [line["step"] for line in run.lines()] == [1, 2, 3]
