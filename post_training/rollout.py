"""Sampling responses to problems and judging them: what distillation, GRPO and evaluation share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.chat import ChatTokenizer
from infra.errors import HeadwaterError
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.sampling import Sampling
from post_training.tasks.problem import Problem
from post_training.verifiers import Verdict, verify


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Ids are those the model saw and made, so that training scores the same tokens."""

    problem: Problem
    system: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    verdict: Verdict


def sample(
    engine: Engine,
    tokenizer: ChatTokenizer,
    problems: Sequence[Problem],
    systems: Sequence[str],
    sampling: Sampling,
    samples: int = 1,
) -> list[Rollout]:
    """`samples` responses to each problem, next to each other; a group shares one reading of its prompt.

    A request's seed depends on the sampling seed, the problem and the sample's number, so a result does not
    depend on what else is asked in the same call. A problem that is asked twice goes on counting, or its
    second group would be a copy of the first.

    Raises HeadwaterError naming a problem whose prompt leaves no room in the engine's context.
    """
    requests: list[Request] = []
    asked: Counter[tuple[str, str]] = Counter()
    for problem, system in zip(problems, systems, strict=True):
        prompt = tuple(tokenizer.prompt_ids(problem.prompt, system))
        if len(prompt) >= engine.context:
            raise HeadwaterError(
                f"a problem of family {problem.family} takes {len(prompt)} tokens, and the model's context "
                f"is {engine.context}: lower the family's size in the tasks stage, or extend the context"
            )
        first = asked[problem.id, system]
        asked[problem.id, system] += samples
        requests += [
            Request(prompt, replace(sampling, seed=_seed(sampling.seed, problem.id, system, first + i)))
            for i in range(samples)
        ]
    completions = engine.generate(requests)
    rollouts = []
    for index, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        problem, system = problems[index // samples], systems[index // samples]
        tokens = tuple(completion.tokens)
        verdict = verify(tokenizer, tokens, problem.answer)
        rollouts.append(Rollout(problem, system, request.prompt, tokens, verdict))
    return rollouts


def _seed(seed: int, problem_id: str, system: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{problem_id}\0{system}\0{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
