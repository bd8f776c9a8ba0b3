"""Problem sets on disk, and how they are drawn: unique, split by hash, in a fixed order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import HeadwaterError, nearest
from infra.files import write_parquet
from post_training.tasks.problem import SYSTEM, Problem, is_held_out
from post_training.tasks.registry import FAMILIES

SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in ("id", "family", "prompt", "thought", "answer", "expected", "system", "twin")
    ]
)
"""`answer` is the text that ends a response (boxed), `expected` what the verifier compares with."""


@dataclass(frozen=True)
class Wanted:
    """How much of one family: problems to train on, held-out ones, and the family's own size."""

    family: str
    train: int
    held_out: int
    size: int


def draw(wanted: Wanted, held_out_share: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held out), all different. Raises HeadwaterError when the family has too few problems of that
    size."""
    family = FAMILIES.get(wanted.family)
    if family is None:
        raise HeadwaterError(
            f"no family of problems is called {wanted.family!r}; {nearest(wanted.family, FAMILIES)}"
        )
    low, high = family.sizes
    if not low <= wanted.size <= high:
        raise HeadwaterError(
            f"family {wanted.family}: size {wanted.size} is outside {low} to {high} ({family.size_help})"
        )
    rng = random.Random(f"{seed}/{wanted.family}")
    train: list[Problem] = []
    held: list[Problem] = []
    seen: set[str] = set()
    misses = repeats = 0
    while len(train) < wanted.train or len(held) < wanted.held_out:
        problem = family.make(rng, wanted.size)
        target, limit = (
            (held, wanted.held_out) if is_held_out(problem, held_out_share) else (train, wanted.train)
        )
        if len(target) >= limit or problem.id in seen:
            misses += 1
            repeats += problem.id in seen
            if misses > 100 * (wanted.train + wanted.held_out) + 10_000:
                raise HeadwaterError(
                    f"family {wanted.family}: {len(train)} of {wanted.train} and {len(held)} of "
                    f"{wanted.held_out} held-out problems found. "
                    + (
                        f"Size {wanted.size} has too few different ones: raise size, or ask for fewer"
                        if 2 * repeats > misses
                        else f"A held_out_share of {held_out_share:g} gives too few on one side: change it, "
                        "or ask for fewer there"
                    )
                )
            continue
        seen.add(problem.id)
        target.append(problem)
    return train, held


def rows(
    problems: Sequence[Problem], direct_share: float, system_share: float, seed: int
) -> list[dict[str, str]]:
    """Rows of SCHEMA. Of reasoned problems, `direct_share` lose their thought and `system_share` of the
    others get the system prompt that asks for it; the choice is a function of the problem and the seed."""
    made = []
    for problem in problems:
        rng = random.Random(f"{seed}/form/{problem.id}")
        direct, system = rng.random() < direct_share, rng.random() < system_share
        reasoned = bool(problem.thought) and not direct
        made.append(
            {
                "id": problem.id,
                "family": problem.family,
                "prompt": problem.prompt,
                "thought": problem.thought if reasoned else "",
                "answer": problem.boxed,
                "expected": problem.answer,
                "system": SYSTEM if reasoned and system else "",
                "twin": problem.twin,
            }
        )
    return made


def write(path: Path, records: Sequence[dict[str, str]]) -> None:
    write_parquet(path, pa.Table.from_pylist(list(records), schema=SCHEMA))


def read(path: Path, families: Sequence[str] = ()) -> list[Problem]:
    """Problems of a set, of the given families or of all.

    Raises HeadwaterError when the set is unreadable or empty, or holds no problem of a family that is asked
    for.
    """
    try:
        table = pq.read_table(path, columns=["family", "prompt", "thought", "expected", "twin"])
    except (OSError, pa.ArrowException) as error:
        raise HeadwaterError(f"{path} is not a readable set of problems: {error}") from error
    problems = [
        Problem(row["family"], row["prompt"], row["thought"], row["expected"], row["twin"])
        for row in table.to_pylist()
    ]
    there = {problem.family for problem in problems}
    missing = [family for family in families if family not in there]
    if missing:
        raise HeadwaterError(
            f"{path} holds no problem of family {missing[0]!r}; {nearest(missing[0], there)}. "
            "Add it to the families of the tasks stage"
        )
    if not problems:
        raise HeadwaterError(f"{path} holds no problem at all: ask the tasks stage for some")
    return [problem for problem in problems if not families or problem.family in families]


def read_asked(path: Path, families: Sequence[str] = ()) -> list[Problem]:
    """What a stage asks a model: the named families, or without names every problem with a worked solution.

    Raises HeadwaterError as `read` does, or when no problem has a worked solution.
    """
    problems = read(path, families)
    asked = [problem for problem in problems if families or problem.thought]
    if not asked:
        raise HeadwaterError(
            f"{path} holds no problem with a worked solution; name the families to ask, or add one that is "
            "reasoned about to the tasks stage"
        )
    return asked


def spread(problems: Sequence[Problem], families: Sequence[str], total: int) -> dict[str, list[Problem]]:
    """The first problems of each family in the order given, `total` over all families, at least one each."""
    each = max(1, total // len(families))
    return {family: [p for p in problems if p.family == family][:each] for family in families}
